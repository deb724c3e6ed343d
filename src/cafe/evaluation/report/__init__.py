"""Compare evaluations on one HTML page."""
