"""Matrices with zeros, stored without them, and products that skip them."""
