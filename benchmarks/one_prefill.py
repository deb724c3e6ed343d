"""Embedding and answering from one reading of each image beside reading it twice.

python benchmarks/one_prefill.py [--images 32] [--json FILE]
"""

import argparse

import numpy as np
from common import SIDE, Row, flops, paired, show, tiny_cafe

from cafe.content import Content
from cafe.scenes.draw import paint
from cafe.scenes.words import CAPTION_PROMPT
from cafe.scenes.world import draw_scenes

NEW_TOKENS = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=32, help="read at once; as many as `embed_and_generate_batch` reads by default"
    )
    count = parser.parse_known_args()[0].images
    model = tiny_cafe()
    images = [paint(scene).resize((SIDE, SIDE)) for scene in draw_scenes(0, "test", count)]
    prompts = [Content.of([image, CAPTION_PROMPT]) for image in images]

    def once() -> tuple[np.ndarray, list[str]]:
        return model.embed_and_generate_batch(images, CAPTION_PROMPT, NEW_TOKENS)

    def twice() -> tuple[np.ndarray, list[str]]:
        return model.embed(images), model.generate_batch(prompts, NEW_TOKENS)

    (vectors, answers), (expected, expected_answers) = once(), twice()
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
    assert answers == expected_answers
    seconds, ratio = paired(once, twice)
    print(f"{count / seconds:.1f} images/s embedded and described in {NEW_TOKENS} tokens, each read once")
    show(
        "Embedding and answer in one prefill",
        [
            Row("12: FLOPs, one prefill / two", flops(once) / flops(twice), 0.55, 0.52, at_least=False),
            Row(f"12: time at {NEW_TOKENS} new tokens, one / two", 1 / ratio, 0.65, 0.58, at_least=False),
        ],
    )


if __name__ == "__main__":
    main()
