"""What an extension is worth: perplexity, passkey."""
