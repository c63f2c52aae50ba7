"""A library of variants for every attention and feed-forward layer, and the choice among them."""
