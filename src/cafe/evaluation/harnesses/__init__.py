"""Plug-ins that let other people's evaluation programs run a checkpoint."""

from typing import Any


def manifest() -> Any:
    """What the entry point `lmms_eval.models` gives: where `lmms-eval --model cafe` finds its class.

    It stands apart from the plug-in: lmms-eval asks for it while it is itself being imported, which may be by the
    plug-in, of which then nothing is there yet.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="cafe", simple_class_path=f"{__name__}.lmms_eval.CafeModel")
