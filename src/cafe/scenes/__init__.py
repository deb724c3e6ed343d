"""The small world: generated pictures with exact words, written in public formats, and the tiny model taught on it."""

from pathlib import Path

BASE = Path(__file__).parent / "base"  # the trained base model; pyproject.toml registers it as "scenes"
