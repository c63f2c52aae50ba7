"""Merging: the passes that make one model of several."""
