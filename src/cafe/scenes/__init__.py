"""The small world: generated images with exact descriptions in public formats, and the tiny model trained on them."""

from pathlib import Path

BASE = Path(__file__).parent / "base"  # the trained base model; pyproject.toml registers it as "scenes"
