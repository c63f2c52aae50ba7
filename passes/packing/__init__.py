"""Passes that store what is left of a matrix so that products with it are faster."""
