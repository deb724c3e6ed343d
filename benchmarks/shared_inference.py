"""Inference that reads what inputs have in common once, beside reading it with each of them.

The time includes the processing of images, which is also done once or with each input.

python benchmarks/shared_inference.py [--json FILE]
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from common import SIDE, Row, flops, paired, show, tiny_cafe

from cafe.content import Content
from cafe.model import Cafe
from cafe.scenes.draw import paint
from cafe.scenes.words import captions
from cafe.scenes.world import draw_scenes

NUM_ANSWERS, NUM_TEXTS, NUM_QUESTIONS = 8, 64, 16


def compare(
    shared: Callable[[], np.ndarray], separate: Callable[[], np.ndarray], tolerance: float
) -> tuple[float, float]:
    """Return the operations and the time of shared reading as fractions of separate reading; both give the same."""
    np.testing.assert_allclose(shared(), separate(), atol=tolerance)
    _, ratio = paired(shared, separate)
    return flops(shared) / flops(separate), 1 / ratio


def compare_embeddings(model: Cafe, contents: list[Any]) -> tuple[float, float]:
    """Compare `embed` with a forward pass that shares nothing; both begin with the contents themselves."""
    packing = replace(model.packing, share_prefixes=False)

    def shared() -> np.ndarray:
        return model.embed(contents, batch_size=len(contents))

    def separate() -> np.ndarray:
        branches = [model.encode_embedding(Content.of(content)) for content in contents]
        return model.embed_branches(branches, packing=packing)

    return compare(shared, separate, 1e-4)


def main() -> None:
    """Print the table."""
    model = tiny_cafe()
    scenes = list(draw_scenes(0, "test", NUM_TEXTS))
    texts = [captions(scene.things)[0] for scene in scenes]
    things = [captions(scene.things[:1])[0] for scene in scenes]
    image = paint(scenes[0]).resize((SIDE, SIDE))
    prompt, answers = [image, "What is in the image?"], things[:NUM_ANSWERS]
    # Separate prompts are one call of `score` for each answer.
    score = compare(
        lambda: model.score_batch([prompt], [answers])[0],
        lambda: np.array([model.score(prompt, answer) for answer in answers]),
        1e-3,
    )
    embed_texts = compare_embeddings(model, texts)
    questions = [{"image": image, "text": f"Is there {thing}?"} for thing in things[:NUM_QUESTIONS]]
    embed_questions = compare_embeddings(model, questions)
    names_and_limits = [
        (f"{NUM_ANSWERS} answers to one prompt scored", score, (0.25, 0.2), (0.4, 0.3)),
        (f"{NUM_TEXTS} short texts embedded", embed_texts, (1.0, 0.6), (1.0, 0.7)),
        (f"{NUM_QUESTIONS} questions about one image embedded", embed_questions, (0.25, 0.15), (0.4, 0.2)),
    ]
    rows = []
    for name, (operations, time), operation_limits, time_limits in names_and_limits:
        rows.append(Row(f"{name}: operations, shared / separate", operations, *operation_limits, at_least=False))
        rows.append(Row(f"{name}: time, shared / separate", time, *time_limits, at_least=False))
    show("Inputs that share what they begin with, read once or with each of them", rows)


if __name__ == "__main__":
    main()
