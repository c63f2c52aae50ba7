"""Rows: the passes that make or choose what later steps train on, and leave the model as it is."""
