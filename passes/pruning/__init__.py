"""Structured pruning: what to remove, how much of it for a speed-up, and what the rest must become."""
