"""A checkpoint as an encoder of MTEB and MIEB.

    import mteb
    from cafe.evaluation.harnesses.mteb import CafeEncoder
    mteb.evaluate(CafeEncoder("runs/mine/checkpoint"), mteb.get_tasks(["CIFAR10ZeroShot"]))

Needs the package mteb (version 2): pip install 'cafe-lvlm[mteb]'.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction

from cafe.content import Content
from cafe.errors import CafeError
from cafe.model import Cafe

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

BATCHES = 4  # gathered before they are embedded, so that contents of like length go together


class CafeEncoder(AbsEncoder):
    """Embeds texts, pictures, and both together, with the instructions that the checkpoint was trained with.

    The tasks' own instructions are not used.

    Args:
        model_name: a directory, a Hub id, or a loaded `Cafe`.
        revision: names the result; nothing is fetched by it.
        device: where the model goes; a GPU where there is one, unless given.
    """

    def __init__(
        self, model_name: "str | Path | Cafe", revision: str | None = None, *, device: str | None = None, **kwargs: Any
    ) -> None:
        self.model = model_name if isinstance(model_name, Cafe) else Cafe.load(model_name, device=device)
        self.mteb_model_meta = metadata(self.model, revision)

    def encode(
        self,
        inputs: "DataLoader[Any]",
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Float32[np.ndarray, "inputs dim"]:
        """The embeddings of the batches of a data loader.

        Raises:
            CafeError: the batches hold neither texts nor pictures, or sounds or videos.
        """
        batch_size = kwargs.get("batch_size", 32)
        waiting: list[Content] = []
        done = []
        for batch in inputs:  # some tasks load pictures one at a time: they are gathered here
            waiting += contents(batch)
            if len(waiting) >= batch_size * BATCHES:
                done.append(self.model.embed(waiting, batch_size))
                waiting = []
        return np.concatenate([*done, *([self.model.embed(waiting, batch_size)] if waiting else [])])


def contents(batch: dict[str, Any]) -> list[Content]:
    """What a batch holds, a content an item: its picture first, then its text."""
    other = sorted({"audio", "video"} & set(batch))
    columns = [batch[name] for name in ("image", "text") if name in batch]
    if other or not columns:
        raise CafeError(f"CAFe embeds texts and pictures, not {' and '.join(other) or 'what this task gives'}.")
    return [Content.of([part for part in parts if part is not None]) for parts in zip(*columns, strict=True)]


def metadata(model: Cafe, revision: str | None = None) -> ModelMeta:
    """What MTEB writes beside the results."""
    name = Path(model.lvlm.name_or_path).name or "checkpoint"
    parameters = sum(parameter.numel() for parameter in model.lvlm.parameters())
    return ModelMeta(
        loader=None,
        name=f"cafe/{name}",
        revision=revision or "local",
        release_date=None,
        languages=None,
        n_parameters=parameters,
        memory_usage_mb=sum(p.numel() * p.element_size() for p in model.lvlm.parameters()) / 2**20,
        max_tokens=getattr(model.lvlm.config.get_text_config(), "max_position_embeddings", None),
        embed_dim=model.lvlm.config.get_text_config().hidden_size,
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
    )
