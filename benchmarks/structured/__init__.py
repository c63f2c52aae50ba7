"""Structured pruning against its rivals, at equal recovery: an encoder by its speed, a decoder by its size."""
