"""Embed encoded images, and caption them from the same prefill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float32

from cafe.images.normalization import Normalization
from cafe.index.reading import Encoded
from cafe.index.store import ImageRow
from cafe.lvlm.generation import generation_kwargs
from cafe.model import Cafe
from cafe.packing import Branch
from cafe.utils.distributed import is_out_of_memory


@dataclass(frozen=True)
class Embedded:
    """Hold the vectors of some images, with their captions and these captions' vectors, None without captions."""

    vectors: Float32[np.ndarray, "images dim"]
    captions: list[str] | None = None
    caption_vectors: Float32[np.ndarray, "images dim"] | None = None


def embed_rows(
    model: Cafe, images: Mapping[str, Encoded], normalization: Normalization | None, max_new_tokens: int
) -> dict[str, ImageRow]:
    """Embed images, and return the row of each by its key; one whose embedding is not finite has none.

    Images in one pass share rows of tokens, in which NaN spreads from one to all: those that are not finite are
    embedded again, each by itself.

    Args:
        model: embeds them, and captions those that were encoded with a prompt.
        images: by their keys.
        normalization: what the images' bytes are normalized with; None where they are no bytes.
        max_new_tokens: the maximum length of a caption, in tokens.
    """
    if not images:
        return {}
    embedded = _embed_or_halve(model, list(images.values()), normalization, max_new_tokens)
    is_finite = np.isfinite(embedded.vectors).all(1)
    rows = {key: _row(key, image, embedded, index) for index, (key, image) in enumerate(images.items())}
    for key, finite in zip(images, is_finite.tolist(), strict=True):
        if not finite:
            del rows[key]
            if len(images) > 1:
                rows |= embed_rows(model, {key: images[key]}, normalization, max_new_tokens)
    return rows


def _row(key: str, image: Encoded, embedded: Embedded, index: int) -> ImageRow:
    """Make the row of an image, which is number `index` of those that were embedded."""
    caption = caption_vector = None
    if embedded.captions is not None and embedded.caption_vectors is not None:
        caption = embedded.captions[index]
        # An empty caption describes nothing, so that no query should come near to it.
        if caption and np.isfinite(embedded.caption_vectors[index]).all():
            caption_vector = embedded.caption_vectors[index]
    return ImageRow(
        key=key,
        vector=embedded.vectors[index],
        caption=caption,
        caption_vector=caption_vector,
        text=image.text,
        width=image.width,
        height=image.height,
        taken_at=image.taken_at,
        appearance=image.appearance,
    )


def _embed_or_halve(
    model: Cafe, images: Sequence[Encoded], normalization: Normalization | None, max_new_tokens: int
) -> Embedded:
    """Embed images in one forward pass, or where the device runs out of memory, one half after the other."""
    try:
        return _embed(model, images, normalization, max_new_tokens)
    except Exception as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    torch.cuda.empty_cache()
    middle = len(images) // 2
    halves = images[:middle], images[middle:]
    return _concatenate(*(_embed_or_halve(model, half, normalization, max_new_tokens) for half in halves))


def _embed(
    model: Cafe, images: Sequence[Encoded], normalization: Normalization | None, max_new_tokens: int
) -> Embedded:
    """Embed images in one forward pass; all of them have a prompt, or none."""
    pairs = [(image.embedding, image.prompt) for image in images if image.prompt]
    if not pairs:
        packing = replace(model.packing, normalization=normalization)
        return Embedded(model.embed_branches([image.embedding for image in images], packing=packing))
    normalized = [(_normalize(one, normalization), _normalize(other, normalization)) for one, other in pairs]
    vectors, captions = model.embed_and_generate_branches(normalized, generation_kwargs(max_new_tokens))
    return Embedded(vectors, captions, model.embed(captions, batch_size=len(captions)))


def _normalize(branch: Branch, normalization: Normalization | None) -> Branch:
    """Return a branch with the model's pixel values in the place of bytes."""
    pixels = branch.image_inputs.get("pixel_values")
    if normalization is None or pixels is None or pixels.dtype != torch.uint8:
        return branch
    return replace(branch, image_inputs={**branch.image_inputs, "pixel_values": normalization.normalize(pixels)})


def _concatenate(first: Embedded, second: Embedded) -> Embedded:
    """Join the results of two halves, which both have captions or both have none."""
    vectors = np.concatenate([first.vectors, second.vectors])
    if first.captions is None or second.captions is None:
        return Embedded(vectors)
    assert first.caption_vectors is not None and second.caption_vectors is not None  # captions have vectors
    caption_vectors = np.concatenate([first.caption_vectors, second.caption_vectors])
    return Embedded(vectors, first.captions + second.captions, caption_vectors)
