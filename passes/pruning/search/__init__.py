"""Searches for sizes that look at the whole pruned model."""
