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

NUM_BATCHES = 4  # embedded together, so that contents of similar length share a batch


class CafeEncoder(AbsEncoder):
    """Embed texts, images, and both together, with the instructions that the checkpoint was trained with.

    The tasks' own instructions are not used.

    Args:
        model_name: a directory, a Hub id, or a loaded `Cafe`.
        revision: a name for the result; it does not choose what is loaded.
        device: the model's device; by default a GPU if there is one.
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
        """Embed the batches of a data loader.

        Raises:
            CafeError: the batches hold neither texts nor images, or audio or videos.
        """
        batch_size = kwargs.get("batch_size", 32)
        pending: list[Content] = []
        embedded = []
        for batch in inputs:
            pending += contents(batch)
            # Some tasks load images one at a time, so batches are collected first.
            if len(pending) >= batch_size * NUM_BATCHES:
                embedded.append(self.model.embed(pending, batch_size))
                pending = []
        if pending:
            embedded.append(self.model.embed(pending, batch_size))
        return np.concatenate(embedded)


def contents(batch: dict[str, Any]) -> list[Content]:
    """Turn a batch into contents, one for each item: its image first, then its text.

    Args:
        batch: columns by name, as MTEB's data loaders yield them.

    Raises:
        CafeError: it holds neither texts nor images, or audio or videos.
    """
    unsupported = sorted({"audio", "video"} & set(batch))
    if unsupported:
        raise CafeError(f"CAFe embeds texts and images, not {' and '.join(unsupported)}.")
    # The order of the names is the order of the parts.
    columns = [batch[name] for name in ("image", "text") if name in batch]
    if not columns:
        raise CafeError("CAFe embeds texts and images, not what this task gives.")
    items = []
    for parts in zip(*columns, strict=True):
        present = [part for part in parts if part is not None]  # some items of a batch lack their image
        items.append(Content.of(present))
    return items


def metadata(model: Cafe, revision: str | None = None) -> ModelMeta:
    """Describe the model as MTEB records it beside the results."""
    name = Path(model.lvlm.name_or_path).name or "checkpoint"
    text_config = model.lvlm.config.get_text_config()
    parameters = list(model.lvlm.parameters())
    # As loaded, in whatever dtype.
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return ModelMeta(
        loader=None,
        name=f"cafe/{name}",
        revision=revision or "local",
        release_date=None,
        languages=None,
        n_parameters=sum(parameter.numel() for parameter in parameters),
        memory_usage_mb=num_bytes / 2**20,
        max_tokens=getattr(text_config, "max_position_embeddings", None),
        embed_dim=text_config.hidden_size,
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
