"""Recovery: the passes that train a model, on labels or towards the dense model."""
