"""Training: the embedded demo model and, later, fine-tuning with LongRoPE factors."""
