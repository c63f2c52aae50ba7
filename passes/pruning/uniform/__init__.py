"""One shape for all blocks: the pass that ends in a plain smaller config."""
