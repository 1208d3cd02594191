"""Read-only access to model files: GGUF and safetensors headers and tensors, HF configs."""
