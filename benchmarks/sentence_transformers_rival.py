"""Contrastive training beside sentence-transformers 6: the same model, files, prompts, batch, chunk and optimizer.

Both sides read JPEG files in one loader worker, embed a batch under a gradient cache, clip and step AdamW in float32.
Each repetition starts its worker anew and makes one step before the clock runs.

python benchmarks/sentence_transformers_rival.py [--json FILE]
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import Row, clock, flops, show, tiny_cafe
from loading import GROUP, PAIRS, write
from torch import Tensor, nn
from transformers import AutoProcessor, TrainerCallback

from cafe.data.batch import MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.loader import iterate_batches
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import with_fast_images
from cafe.model import Cafe
from cafe.training.optimizer import make_optimizer
from cafe.training.recipe import ObjectiveConfig, OptimizerConfig
from cafe.training.step import JointStep

try:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.util import batch_to_device
except ImportError:
    sys.exit("This benchmark needs sentence-transformers: pip install 'sentence-transformers[train]>=6'")

CHUNK, REPETITIONS = 4, 5
CROPS = 5  # of each image: a thumbnail and four
STEPS = GROUP - 1  # timed, after the first
RATE, CLIP = 1e-5, 1.0
OBJECTIVE = ObjectiveConfig(lm_weight=0.0, mask_duplicates=False)


class Ours:
    """Our joint step, contrastive alone."""

    def __init__(self, model: Cafe, records: Path) -> None:
        source = open_source(Source(path=str(records)))
        size = MicroBatchSize(crops=CROPS * CHUNK)
        chat_processor, normalization = with_fast_images(model.chat_processor)
        packing = replace(model.packing, normalization=normalization)
        self.batches = ContrastiveBatchDataset(
            [source], chat_processor, PAIRS, seed=0, language=False, packing=packing, micro_batch_size=size
        )
        self.step = JointStep(model.lvlm.train(), OBJECTIVE)
        recipe = OptimizerConfig(learning_rate=RATE, vision_tower_learning_rate=None, max_grad_norm=CLIP)
        self.optimizer = make_optimizer(self.step, model.lvlm.config.model_type, recipe)

    def loss(self) -> Tensor:
        """Of the first batch; its gradient is left in the parameters."""
        return self.step.forward_backward(self.batches[0]).contrastive

    def seconds(self) -> float:
        """Of some steps."""
        stream = iterate_batches(self.batches, 0, STEPS + 1, num_workers=1)

        def train(steps: int) -> None:
            for batch in islice(stream, steps):
                self.step.forward_backward(batch)
                nn.utils.clip_grad_norm_(self.step.parameters(), CLIP)
                self.optimizer.step()
                self.optimizer.zero_grad()

        train(1)
        return clock(lambda: train(STEPS))


class Theirs:
    """Their trainer, on a copy of the model and with our prompts."""

    def __init__(self, model: Cafe, records: Path) -> None:
        directory, prompts = records.parent, model.chat_processor.prompts
        model.lvlm.save_pretrained(directory / "model")
        chat = {"add_generation_prompt": True}
        model.chat_processor.save(directory / "model")
        # Without torchvision the processor can only be loaded without its video part.
        with patch.object(AutoProcessor, "from_pretrained", load_processor):
            transformer = Transformer(str(directory / "model"), processing_kwargs={"chat_template": chat})
        pooling = Pooling(transformer.get_embedding_dimension(), "lasttoken")
        embedder = SentenceTransformer(modules=[transformer, pooling])
        rows = json.loads(records.read_text())
        images = [str(directory / row["image"]) for row in rows]
        self.data = Dataset.from_dict(
            {
                "query": [{"image": path, "text": prompts.image_instruction} for path in images],
                "target": [row["conversations"][1]["value"] + prompts.text_instruction for row in rows],
            }
        )
        self.stopwatch = Stopwatch()
        self.trainer = SentenceTransformerTrainer(
            embedder,
            SentenceTransformerTrainingArguments(
                str(directory / "run"),
                max_steps=STEPS + 1,
                per_device_train_batch_size=PAIRS,
                learning_rate=RATE,
                max_grad_norm=CLIP,
                prompts=prompts.system,
                dataloader_num_workers=1,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            self.data,
            loss=CachedMultipleNegativesRankingLoss(
                embedder,
                scale=1 / OBJECTIVE.temperature,
                mini_batch_size=CHUNK,
                directions=("query_to_doc", "doc_to_query"),  # what was CachedMultipleNegativesSymmetricRankingLoss
                partition_mode="per_direction",
            ),
            callbacks=[self.stopwatch],
        )

    def loss(self, places: list[int]) -> Tensor:
        """Of a batch of these records; its gradient is left in the parameters."""
        model = self.trainer.model.train()
        batch = batch_to_device(self.trainer.data_collator([self.data[place] for place in places]), model.device)
        loss = self.trainer.compute_loss(model, batch)
        loss.backward()
        return loss.detach()

    def seconds(self) -> float:
        """Of some steps."""
        self.trainer.train()
        return self.stopwatch.ends[-1] - self.stopwatch.ends[-1 - STEPS]


class Stopwatch(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    """Print the table."""
    model = tiny_cafe()
    model.chat_processor.prompts = replace(
        model.chat_processor.prompts, assistant_frame="open"
    )  # theirs end where the template does
    with tempfile.TemporaryDirectory() as directory:
        records = write(Path(directory))
        ours, theirs = Ours(model, records), Theirs(model, records)
        first = ours.batches.order(0).records[:PAIRS].tolist()
        assert len(ours.batches[0].micro_batches) == PAIRS // CHUNK
        torch.testing.assert_close(theirs.loss(first), ours.loss(), rtol=1e-3, atol=1e-3)
        work = flops(lambda: theirs.loss(first)) / flops(ours.loss)
        ours.optimizer.zero_grad()
        theirs.trainer.model.zero_grad()
        ours.seconds()
        theirs.seconds()
        times = [(ours.seconds(), theirs.seconds()) for _ in range(REPETITIONS)]
    seconds = statistics.median(one for one, _ in times)
    ratio = statistics.median(other / one for one, other in times)
    print(
        f"{STEPS * PAIRS / seconds:.1f} pairs/s in batches of {PAIRS} pairs, {CHUNK} at once; sentence-transformers "
        f"computes {work:.2f} times our FLOPs"
    )
    show("Beside sentence-transformers", [Row("14: pairs/s, ours / sentence-transformers", ratio, 1.2, 1.5)])


if __name__ == "__main__":
    main()
