"""Recovery: what the ways to train a compressed model are worth."""
