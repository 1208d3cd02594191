"""Writers: every file format that can carry a `RopeScaling`, and the proof that runtimes apply it."""
