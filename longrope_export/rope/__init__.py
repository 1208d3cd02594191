"""RoPE mathematics: frequencies and closed-form scaling methods, as pure functions."""
