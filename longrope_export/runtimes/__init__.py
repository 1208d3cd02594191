"""Running a model file in a real runtime."""
