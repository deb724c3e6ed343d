"""What differs between LVLM families, in one table: which parameters make up the vision tower and the projector."""

from dataclasses import dataclass
from typing import Literal

PartName = Literal["vision_tower", "projector", "language_model"]


@dataclass(frozen=True)
class Family:
    """A row of the table. Names are pieces of parameter names; what matches neither is the language model."""

    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]


_LLAVA = Family(vision_tower=("vision_tower.",), projector=("multi_modal_projector.", "image_newline"))
_QWEN = Family(vision_tower=("visual.",), projector=("visual.merger.", "visual.deepstack_merger_list."))

FAMILIES = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": Family(vision_tower=("vision_model.",), projector=("connector.",)),
    "smolvlm": Family(vision_tower=("vision_model.",), projector=("connector.",)),
    "internvl": _LLAVA,
    "paligemma": _LLAVA,
    "gemma3": _LLAVA,
}

_UNKNOWN = Family(
    vision_tower=("vision_tower.", "vision_model.", "visual."),
    projector=("projector.", "connector.", "merger.", "image_newline"),
)


def part_of(parameter: str, model_type: str) -> PartName:
    """The part that a parameter belongs to, by its name and the family's."""
    family = FAMILIES.get(model_type, _UNKNOWN)
    if any(piece in parameter for piece in family.projector):
        return "projector"
    return "vision_tower" if any(piece in parameter for piece in family.vision_tower) else "language_model"
