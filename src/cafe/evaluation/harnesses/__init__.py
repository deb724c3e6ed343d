"""Plug-ins that let other evaluation programs run a checkpoint."""

from typing import Any


def manifest() -> Any:
    """Tell lmms-eval where to find the class of `lmms-eval --model cafe`; the entry point `lmms_eval.models`.

    It is separate from the plug-in. lmms-eval calls it while it is being imported itself, possibly by the plug-in,
    whose module is then still empty.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="cafe", simple_class_path=f"{__name__}.lmms_eval.CafeModel")
