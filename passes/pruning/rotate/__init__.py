"""The residual stream in other axes: the pass that slices it to its principal components."""
