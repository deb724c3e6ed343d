"""CAFe: one vision-language checkpoint that retrieves and talks (arXiv 2503.19900)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cafe.content import Content
    from cafe.index.collection import Collection
    from cafe.losses import info_nce
    from cafe.model import Cafe
    from cafe.training.loop import train
    from cafe.training.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Cafe", "Collection", "Content", "Recipe", "__version__", "info_nce", "train"]

_MODULES = {
    "Cafe": "cafe.model",
    "Collection": "cafe.index.collection",
    "Content": "cafe.content",
    "Recipe": "cafe.training.recipe",
    "info_nce": "cafe.losses",
    "train": "cafe.training.loop",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `cafe --help` and the small modules do not wait for transformers.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'cafe' has no attribute {name!r}")
