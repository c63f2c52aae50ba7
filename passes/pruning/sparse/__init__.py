"""Single weights, short runs of them or N of M set to zero: sparse matrices of the shapes that they had."""
