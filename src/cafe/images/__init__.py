"""Images as pixels: decoded, resized, normalized. Nothing here knows a model."""
