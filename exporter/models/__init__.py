"""MobileVLM in PyTorch: the reference that every compiled graph is compared with."""
