"""Search for RoPE rescale factors."""
