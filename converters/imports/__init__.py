"""Factors from other tools' files as a `RopeScaling`: microsoft/LongRoPE's CSV, model configs, GGUF files."""
