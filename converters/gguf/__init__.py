"""Writing GGUF files: patching existing ones and converting Hugging Face folders."""
