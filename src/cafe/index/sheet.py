"""Contact sheets: what a search found, on one image or one HTML page."""
