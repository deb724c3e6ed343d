"""Evaluation during training: what it measures is logged, and the best checkpoint by one of its results is kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import torch

from cafe.content import Example
from cafe.data.dataset import NO_LIMIT, PROPORTIONAL, ContrastiveBatchDataset
from cafe.errors import CafeError
from cafe.model import Cafe
from cafe.training.build import build_dataset
from cafe.training.checkpointing import TrainerState
from cafe.training.fsdp import full_state_dict, unsharded
from cafe.training.metrics_log import MetricsLogger
from cafe.training.nonfinite import forward_micro_batches
from cafe.training.recipe import Recipe, recipe_dict
from cafe.training.run_directory import BEST
from cafe.training.step import JointStep
from cafe.utils.distributed import all_reduce_sum_, run_on_main_and_broadcast, world_size
from cafe.utils.rng import get_rng_state, set_rng_state

BATCH = 8  # held-out dialogues read at once


class Validator:
    """What a recipe wants to be measured during training.

    Every process measures, the same with the same result: a sharded model needs them all, and none waits for another.

    Args:
        recipe: says what and when.
        model, joint: what is trained.
        evaluate: measures the model on `recipe.evaluation.data`; None where there is none.
        rank: of this process.

    Raises:
        CafeError: the recipe wants a measurement and does not say of what, or the best checkpoint and no measurement.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Cafe,
        joint: JointStep,
        evaluate: Callable[[Cafe], dict[str, float]] | None,
        rank: int,
    ) -> None:
        wanted = recipe.evaluation
        self.recipe, self.model, self.joint = recipe, model, joint
        self.evaluate = evaluate
        if wanted.eval_steps and not (self.evaluate or wanted.sources):
            raise CafeError(
                "evaluation.eval_steps is set, and neither evaluation.data nor evaluation.sources says of what."
            )
        if recipe.metric_for_best_model and not wanted.eval_steps:
            raise CafeError(
                "metric_for_best_model goes by a result of the evaluation during training: set evaluation.eval_steps too."
            )
        self.held_out = (
            validation_batches(recipe, model, rank, bool(joint.blank)) if wanted.eval_steps and wanted.sources else None
        )

    def should_run(self, step: int) -> bool:
        """Whether it is time."""
        return bool(self.recipe.evaluation.eval_steps) and step % self.recipe.evaluation.eval_steps == 0

    @torch.compiler.set_stance("force_eager")  # what is compiled is for training's lengths
    def __call__(self, at: TrainerState, log: MetricsLogger | None) -> None:
        """Measures, logs what comes out, and keeps the checkpoint if it is the best so far. Training goes on unchanged.

        Raises:
            CafeError: there is no result of the name that `metric_for_best_model` gives.
        """
        state = get_rng_state()
        model = replace(self.model, lvlm=self.model.lvlm.eval())
        samples = {}
        reading = self.joint.packed_forward
        with unsharded(reading), reading.autocast():
            results = dict(self.evaluate(model)) if self.evaluate else {}
            if self.held_out:
                samples["samples"] = generate_samples(model, self.held_out, self.recipe.evaluation.num_samples)
        if self.held_out:
            results["held_out/lm_loss"] = validation_loss(self.joint, self.held_out, self.recipe)
        if log:
            log.write(at.step, {**results, **samples})
        name = self.recipe.metric_for_best_model
        if name and run_on_main_and_broadcast(lambda: is_better(results, name, at.best_metric)):
            at.best_metric = run_on_main_and_broadcast(lambda: results[name.removeprefix("-")])
            weights = full_state_dict(model.lvlm)
            if log:
                made = {"recipe": recipe_dict(self.recipe), "steps": at.step, "results": results}
                model.save(Path(self.recipe.output) / BEST, weights, **made)
        self.model.lvlm.train()
        set_rng_state(state)


def validation_batches(recipe: Recipe, model: Cafe, rank: int, sharded: bool = False) -> ContrastiveBatchDataset:
    """The dialogues of `recipe.evaluation.sources`."""
    language = replace(recipe.objective, contrastive_weight=0.0, lm_weight=1.0)
    data = replace(recipe.data, sources=recipe.evaluation.sources, mixture=PROPORTIONAL)
    held_out = replace(recipe, data=data, objective=language, batch_size=BATCH, micro_batch=NO_LIMIT)
    return build_dataset(held_out, model, rank, world_size(), sharded)


@torch.no_grad()
def validation_loss(joint: JointStep, batches: ContrastiveBatchDataset, recipe: Recipe) -> float:
    """The mean language loss over the supervised tokens of held-out dialogues."""
    device = joint.log_temperature.device
    limit = recipe.evaluation.limit
    count = min(len(batches), -(-limit // (BATCH * world_size()))) if limit else len(batches)
    total, tokens = torch.zeros((), device=device), torch.zeros((), device=device)
    for number in range(count):
        batch = batches[number]
        total += sum(said for _, said in forward_micro_batches(joint, batch))
        tokens += batch.num_supervised
    return (all_reduce_sum_(total) / all_reduce_sum_(tokens).clamp(min=1)).item()


def generate_samples(model: Cafe, batches: ContrastiveBatchDataset, count: int) -> list[dict[str, str]]:
    """What the model answers to the first turn of some held-out dialogues, beside what it should."""
    examples = list(islice(_dialogues(model, batches), count))
    turns = [example.dialogue.turns for example in examples if example.dialogue]
    said = model.generate_batch([asked.content for asked, *_ in turns]) if turns else []
    return [
        {"record": example.origin, "asked": asked.content.text, "said": answer, "answer": right.content.text}
        for example, (asked, right, *_), answer in zip(examples, turns, said, strict=True)
    ]


def _dialogues(model: Cafe, batches: ContrastiveBatchDataset) -> Iterator[Example]:
    """Those whose first turn can be read: a bad record is left out, as it is of the loss."""
    order = batches.order(0)
    for which, index in zip(order.sources, order.records, strict=True):
        try:
            example = batches.sources[int(which)].example(int(index), Random(f"sample {which} {index}"))
            if not example.dialogue or len(example.dialogue.turns) < 2:
                continue
            model.encode_prompt(example.dialogue.turns[0].content)
        except CafeError:
            continue
        yield example


def is_better(results: dict[str, float], name: str, best: float | None) -> bool:
    """Whether a result is better than the best so far: higher, or lower where its name has a minus sign before it.

    What is not finite is never better, and never the best.
    """
    metric = name.removeprefix("-")
    if metric not in results:
        known = ", ".join(sorted(results))
        raise CafeError(f"The evaluation has no result {metric} for metric_for_best_model to go by; it has {known}.")
    found = results[metric]
    if best is None or not math.isfinite(best):
        return math.isfinite(found)
    return math.isfinite(found) and (found < best if name.startswith("-") else found > best)
