"""What quantization costs and wins."""
