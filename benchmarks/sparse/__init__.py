"""Sparse models: what zeros cost, and where they pay."""
