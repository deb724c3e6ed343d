"""A checkpoint -> numbers and a report."""
