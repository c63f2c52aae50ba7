"""What kernels and whole decoders take on an NVIDIA GPU."""
