"""The small world: generated pictures with exact words, written in public formats, and the tiny model taught on it."""
