"""What there is to know about a collection at a glance."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cafe.index.manifest import Manifest, size_on_disk
from cafe.index.snapshot import Snapshot


def summarize(directory: Path, manifest: Manifest, snapshot: Snapshot, num_failures: int) -> dict[str, Any]:
    """Return what `cafe collections info` shows.

    Args:
        directory: the collection.
        manifest: of its generation in use.
        snapshot: its images.
        num_failures: the number of places that cannot be read.
    """
    return {
        "directory": str(directory),
        "model": manifest.model,
        "dim": manifest.dim,
        "created": manifest.created,
        "images": len(snapshot),
        "captions": len(snapshot.images["caption"].drop_null()),
        "places": sum(map(len, snapshot.places)),
        "failures": num_failures,
        "roots": [root.path for root in manifest.roots],
        "bytes": size_on_disk(directory),
        "calibration": asdict(manifest.calibration) if manifest.calibration else None,
        "vector_index": asdict(manifest.vector_index) if manifest.vector_index else None,
    }
