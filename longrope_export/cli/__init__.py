"""The `longrope` command: one file a command group."""
