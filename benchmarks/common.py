"""What the benchmarks share: the model and batch they run on, paired timing, and their tables."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from cpu_flops import CPU_ATTENTION
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from cafe.attention.registration import use_tree_attention
from cafe.data.batch import NO_LIMIT, Batch, MicroBatch, MicroBatchSize, split_micro_batches
from cafe.lvlm.forward import infer_packing
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.packing import Branch, PackingConfig, pack
from cafe.scenes.base import MODEL, corpus
from cafe.scenes.tiny_llava import make_processor

CROP, PATCH, SIDE = 84, 14, 168  # pixels: one thumbnail and four crops of 6 x 6 patches, 192 image tokens with newlines
GRID = CROP // PATCH
IMAGE_TOKENS = GRID * GRID + (2 * GRID) * (2 * GRID + 1)
IMAGE, VOCABULARY = 1, 4096
SYSTEM, INSTRUCTION, PROMPT, CAPTION = 14, 14, 12, 64  # tokens


@dataclass(frozen=True)
class Row:
    """Hold one figure of a benchmark: what it must reach and what it aims at, as the direction says."""

    name: str
    value: float
    must: float
    aim: float
    at_least: bool = True


def tiny_llava(image_token: int = IMAGE) -> PreTrainedModel:
    """Build a LLaVA-OneVision of 7M parameters with random weights."""
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=CROP,
            patch_size=PATCH,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        image_token_index=image_token,
        video_token_index=2,
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    use_tree_attention(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def tiny_cafe() -> Cafe:
    """Build that model with the small world's tokenizer, reading images as four crops and a thumbnail."""
    processor = make_processor(corpus(0, 200), MODEL)
    processor.image_processor.size = {"height": CROP, "width": CROP}
    processor.image_processor.image_grid_pinpoints = [[SIDE, SIDE]]
    processor.num_image_tokens = GRID * GRID
    chat_processor = ChatProcessor(processor, Prompts())
    lvlm = tiny_llava(chat_processor.image_token_id).eval()
    lvlm.generation_config.eos_token_id = None  # random weights do not know when to stop
    lvlm.generation_config.pad_token_id = chat_processor.tokenizer.pad_token_id
    return Cafe(lvlm, chat_processor, infer_packing(lvlm, chat_processor))


@dataclass(frozen=True)
class Sides:
    """Hold the branches of some pairs: an image, its caption, and a dialogue that describes the image."""

    queries: list[Branch]
    targets: list[Branch]
    dialogues: list[Branch]


def make_pairs(count: int, seed: int = 0, caption: int = CAPTION) -> Sides:
    """Make pairs of random images and random words in the prompts of the method; captions vary by half in length."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (length,), generator=generator)

    system, instruction, sentence, prompt = words(SYSTEM), words(INSTRUCTION), words(INSTRUCTION), words(PROMPT)
    sides = Sides([], [], [])
    for _ in range(count):
        vision = {
            "pixel_values": torch.rand(1, 5, 3, CROP, CROP, generator=generator),
            "image_sizes": torch.tensor([[SIDE, SIDE]]),
        }
        caption_ids = words(int(torch.randint(caption // 2, caption * 3 // 2, (), generator=generator)))
        image_ids = torch.full((IMAGE_TOKENS,), IMAGE)
        sides.queries.append(branch(torch.cat([system, image_ids, instruction]), vision))
        sides.targets.append(branch(torch.cat([system, caption_ids, sentence]), {}))
        dialogue = torch.cat([system, image_ids, prompt, caption_ids])
        sides.dialogues.append(branch(dialogue, vision, len(caption_ids)))
    return sides


def branch(ids: Tensor, vision: dict[str, Tensor], supervised: int = 0, image: int = IMAGE) -> Branch:
    """Make a branch whose last tokens are supervised."""
    return Branch(ids, torch.arange(len(ids)) >= len(ids) - supervised, ids == image, vision)


def make_batch(sides: Sides, packing: PackingConfig, size: MicroBatchSize = NO_LIMIT) -> Batch:
    """Pack the pairs as the joint step reads them."""
    pairs = len(sides.queries)
    embedded = [[query, target] for query, target in zip(sides.queries, sides.targets, strict=True)]
    dialogues = [[dialogue] for dialogue in sides.dialogues]
    cuts = split_micro_batches(embedded, dialogues, size)
    micro_batches = []
    for part in cuts:
        joint = pack(embedded[part], dialogues[part], packing)
        alone = pack(embedded[part], [[]] * len(dialogues[part]), packing) if len(cuts) > 1 else joint
        slots = [slot for pair in range(*part.indices(pairs)) for slot in (pair, pairs + pair)]
        micro_batches.append(MicroBatch(joint, alone, torch.tensor(slots)))
    return Batch(
        micro_batches,
        query_ids=torch.arange(pairs),
        target_ids=torch.arange(pairs),
        negative_owner=torch.empty(0, dtype=torch.long),
        negative_match_prob=torch.empty(0),
        negative_ids=torch.empty(0, dtype=torch.long),
        num_supervised=sum(len(micro_batch.joint.labels) for micro_batch in micro_batches),
        bad_records=[],
        record_names=[""] * pairs,
    )


def paired(first: Callable[[], object], second: Callable[[], object], repetitions: int = 5) -> tuple[float, float]:
    """Time two kinds of work, interleaved, in seconds: (median of the first, median of the ratios second / first)."""
    first()
    second()
    times = [(clock(first), clock(second)) for _ in range(repetitions)]
    return statistics.median(one for one, _ in times), statistics.median(other / one for one, other in times)


def flops(work: Callable[[], object]) -> int:
    """Count the floating-point operations of some work, as PyTorch does, and on a CPU those of attention.

    PyTorch has no formula for attention on a CPU. Here it is counted for the pairs of tokens that no mask hides, and
    the scores that its backward pass computes again are not counted. (PyTorch's own formulas, those of a GPU, count
    both.)
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return int(counter.get_total_flops())


def clock(work: Callable[[], object]) -> float:
    """Time some work, in seconds."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def machine() -> str:
    """Describe the machine and the versions it ran with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{device} ({platform.machine()}), {versions}"


def show(title: str, rows: list[Row]) -> None:
    """Print the table, and write it where `--json FILE` says; a figure that misses what it must makes it fail."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path)
    options, _ = parser.parse_known_args()
    print(f"\n{title}\non {machine()}\n\n| figure | measured | must | aim |\n|---|---|---|---|")
    missed = False
    for row in rows:
        sign = "≥" if row.at_least else "≤"
        print(f"| {row.name} | {row.value:.3g} | {sign} {row.must:g} | {sign} {row.aim:g} |")
        missed |= row.value < row.must if row.at_least else row.value > row.must
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if missed:
        sys.exit("A figure misses what it must reach.")
