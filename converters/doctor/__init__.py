"""The doctor: names what is wrong with the RoPE scaling of a GGUF file or a model folder, and mends it."""
