"""How fast and how small everything together makes a model."""
