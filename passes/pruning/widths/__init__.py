"""Heads and feed-forward columns: passes that cut them to a measured speed-up, and what those build on."""
