"""Passes that leave fewer values to weights: grids of few bits, and what makes models take them better."""
