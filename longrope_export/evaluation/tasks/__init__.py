"""The tasks of `longrope eval`, one a file."""
