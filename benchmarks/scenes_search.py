"""A trained model's collection of the scenes' test images: search beside `cafe evaluate`, reranking, and answers.

Each caption of the test images is searched. Each question about them is asked about the image that its own first
caption finds: answered from the image's pixels, and from the model's caption of that image alone.

python benchmarks/scenes_search.py [--checkpoint runs/quickstart/run/checkpoint] [--data runs/quickstart/scenes]
    [--queries N] [--json FILE]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from common import Row, show
from tqdm import tqdm

from cafe import Cafe, Collection
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import json_lines
from cafe.evaluation.suites.captioned_images import USER_DATASET, CaptionedImages
from cafe.evaluation.suites.retrieval import RETRIEVAL
from cafe.evaluation.suites.vqa import FIELDS, MAX_NEW_TOKENS
from cafe.scenes.words import CAPTION_PROMPT

RERANKED = 20  # images that the model is asked about


def recall(collection: Collection, captioned: CaptionedImages, count: int, rerank: bool = False) -> float:
    """Return the fraction of the first captions whose image is found first."""
    right = []
    pairs = list(zip(captioned.texts, captioned.owner.tolist(), strict=True))[:count]
    for text, owner in tqdm(pairs, desc="rerank" if rerank else "search", leave=False):
        [hit, *_] = collection.search(text, k=RERANKED if rerank else 1, rerank=rerank)
        right.append(Path(hit.path).name == Path(captioned.names[owner]).name)
    return float(np.mean(right))


def answer_rates(
    collection: Collection, captioned: CaptionedImages, data: Path, count: int
) -> tuple[float, float, float]:
    """Return the fractions of the first questions that are answered right: from images, from captions, and by both."""
    captions = {
        captioned.names[owner]: text
        for text, owner in reversed(list(zip(captioned.texts, captioned.owner, strict=True)))
    }
    from_images, from_captions = [], []
    for row in tqdm(json_lines(data / "vqa_test.jsonl", FIELDS)[:count], desc="ask", leave=False):
        question, expected = row["text"], row["answer"].lower()
        answer = collection.ask(question, find=captions[row["image"]], k=1, max_new_tokens=MAX_NEW_TOKENS)
        from_images.append(answer.text.lower() == expected)
        said = collection.model.generate(None, f"{answer.sources[0].caption}\n{question}", MAX_NEW_TOKENS)
        from_captions.append(str(said).lower() == expected)
    both = np.logical_and(from_images, from_captions)
    return float(np.mean(from_images)), float(np.mean(from_captions)), float(np.mean(both))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default="runs/quickstart/run/checkpoint")
    parser.add_argument("--data", type=Path, default="runs/quickstart/scenes")
    parser.add_argument("--queries", type=int, default=10**9, help="search and ask so many, not all")
    options, _ = parser.parse_known_args()
    model, data, count = Cafe.load(options.checkpoint), options.data, options.queries
    captioned = USER_DATASET.read(data, None)
    rows = RETRIEVAL.run(CachedModel(model), data, None).outputs["retrieval/text_to_image"][:count]
    evaluated = float(np.mean([row["marks"]["retrieval/text_to_image/R@1"] for row in rows]))
    with tempfile.TemporaryDirectory() as directory:
        collection = Collection.open(Path(directory, "collection"), model)
        report = collection.add(data / "images" / "test")
        assert report.added == len(captioned.names), report
        searched = recall(collection, captioned, count)
        reranked = recall(collection, captioned, count, rerank=True)
        collection.add(data / "images" / "test", describe=True, describe_prompt=CAPTION_PROMPT)
        described = recall(collection, captioned, count)
        from_images, from_captions, both = answer_rates(collection, captioned, data, count)
    print(
        f"{len(rows)} captions, {len(captioned.names)} images: R@1 of `cafe evaluate` {evaluated:.3f}, of search "
        f"{searched:.3f}, reranked {reranked:.3f}, with the model's captions {described:.3f}\n"
        f"questions answered right: {from_images:.3f} from images, {from_captions:.3f} from captions, {both:.3f} both"
    )
    show(
        "Search and answers on the scenes",
        [
            Row("R@1, `search` / `cafe evaluate`", searched / evaluated, 0.99, 1.0),
            Row("R@1, reranked - not", reranked - searched, -1, 0),
            Row("R@1, with the model's captions - without", described - searched, 0, 0),
            Row("answered right, from images - from captions", from_images - from_captions, 0, 0),
        ],
    )


if __name__ == "__main__":
    main()
