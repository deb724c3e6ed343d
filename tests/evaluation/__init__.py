"""A package, because two folders have a test file of the same name."""
