"""Evaluation during training: results are logged, and the best checkpoint by one of them is kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import torch

from cafe.content import Content
from cafe.data.batch import NO_LIMIT
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.mixture import PROPORTIONAL
from cafe.errors import RecipeError, RecordError
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

BATCH_SIZE = 8  # held-out dialogues per forward pass


class Validator:
    """Evaluates the model during training as the recipe says.

    Every process evaluates everything, with the same results: a sharded model needs them all, and none waits.

    Args:
        recipe: says what is evaluated and when.
        model, joint: what is trained.
        evaluate: measures the model on `recipe.evaluation.data`; None where there is none.
        rank: of this process.

    Raises:
        RecipeError: the recipe asks for an evaluation but not of what, or for the best checkpoint without one.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Cafe,
        joint: JointStep,
        evaluate: Callable[[Cafe], dict[str, float]] | None,
        rank: int,
    ) -> None:
        _check_is_complete(recipe, evaluate)
        config = recipe.evaluation
        self.recipe, self.model, self.joint, self.evaluate = recipe, model, joint, evaluate
        self.dataset: ContrastiveBatchDataset | None = None
        if config.eval_steps and config.sources:
            self.dataset = validation_dataset(recipe, model, rank, sharded=bool(joint.blank_micro_batch))

    @torch.compiler.set_stance("force_eager")  # evaluation has other lengths than those compiled for
    def __call__(self, state: TrainerState, log: MetricsLogger | None) -> None:
        """Evaluate, log the results, and save the checkpoint if it is the best so far. Training is not affected.

        Raises:
            RecipeError: there is no result by the name of `metric_for_best_model`.
        """
        # Training must not notice: the mode and the generators are restored below.
        rng_state = get_rng_state()
        model = replace(self.model, lvlm=self.model.lvlm.eval())
        results, samples = self.measure(model)
        if log:
            log.write(state.step, {**results, **samples})
        self.save_if_best(model, results, state, log)
        self.model.lvlm.train()
        set_rng_state(rng_state)

    def measure(self, model: Cafe) -> tuple[dict[str, float], dict[str, list[dict[str, str]]]]:
        """Return the results of the evaluation, and sample answers to held-out dialogues."""
        results: dict[str, float] = {}
        samples: dict[str, list[dict[str, str]]] = {}
        packed_forward = self.joint.packed_forward
        # Both use the model itself, outside of the module whose forward gathers the weights and casts.
        with unsharded(packed_forward), packed_forward.autocast():
            if self.evaluate:
                results |= self.evaluate(model)
            if self.dataset:
                samples["samples"] = generate_samples(model, self.dataset, self.recipe.evaluation.num_samples)
        if self.dataset:
            results["held_out/lm_loss"] = validation_loss(self.joint, self.dataset, self.recipe)
        return results, samples

    def save_if_best(
        self, model: Cafe, results: dict[str, float], state: TrainerState, log: MetricsLogger | None
    ) -> None:
        """Save the checkpoint if its result by `metric_for_best_model` is the best so far."""
        # The main process decides: rounding may differ between processes.
        name = self.recipe.metric_for_best_model
        if not name:
            return
        if not run_on_main_and_broadcast(lambda: is_better(results, name, state.best_metric)):
            return
        state.best_metric = run_on_main_and_broadcast(lambda: results[name.removeprefix("-")])
        weights = full_state_dict(model.lvlm)
        if log:
            temperature = self.joint.log_temperature.exp().item()
            metadata = {
                "temperature": temperature,
                "recipe": recipe_dict(self.recipe),
                "steps": state.step,
                "results": results,
            }
            model.save(Path(self.recipe.output) / BEST, weights, **metadata)


def _check_is_complete(recipe: Recipe, evaluate: Callable[[Cafe], dict[str, float]] | None) -> None:
    """Check that there is something to evaluate at the recipe's steps, and that the best checkpoint can be told."""
    if recipe.evaluation.eval_steps:
        has_data = evaluate or recipe.evaluation.sources
        if not has_data:
            raise RecipeError("evaluation.eval_steps is set, but neither evaluation.data nor evaluation.sources is.")
    elif recipe.metric_for_best_model:
        raise RecipeError(
            "metric_for_best_model names a result of the evaluation during training: set evaluation.eval_steps too."
        )


def validation_dataset(recipe: Recipe, model: Cafe, rank: int, sharded: bool = False) -> ContrastiveBatchDataset:
    """Open the dialogues of `recipe.evaluation.sources`."""
    # The loss of dialogues alone, in batches that always go through the model at once.
    language = replace(recipe.objective, contrastive_weight=0.0, lm_weight=1.0)
    data = replace(recipe.data, sources=recipe.evaluation.sources, mixture=PROPORTIONAL)
    held_out = replace(recipe, data=data, objective=language, batch_size=BATCH_SIZE, micro_batch=NO_LIMIT)
    return build_dataset(held_out, model, rank, world_size(), sharded)


@torch.no_grad()
def validation_loss(joint: JointStep, dataset: ContrastiveBatchDataset, recipe: Recipe) -> float:
    """Return the mean language modeling loss over the supervised tokens of held-out dialogues, of all processes."""
    limit, num_batches = recipe.evaluation.limit, len(dataset)
    if limit:
        # A batch has `BATCH_SIZE` records of each process.
        num_batches = min(num_batches, math.ceil(limit / (BATCH_SIZE * world_size())))
    # Summed over tokens first: a mean of the batches' means would weigh short answers more.
    total, tokens = torch.zeros((), device=joint.device), torch.zeros((), device=joint.device)
    for number in range(num_batches):
        batch = dataset[number]
        total += sum(lm_loss_sum for _, lm_loss_sum in forward_micro_batches(joint, batch))
        tokens += batch.num_supervised
    return (all_reduce_sum_(total) / all_reduce_sum_(tokens).clamp(min=1)).item()


def generate_samples(model: Cafe, dataset: ContrastiveBatchDataset, count: int) -> list[dict[str, str]]:
    """Generate the model's answers to the first turn of `count` held-out dialogues, beside the right ones."""
    rounds = list(islice(_first_rounds(model, dataset), count))
    if not rounds:
        return []
    answers = model.generate_batch([question for _, question, _ in rounds])
    samples = []
    for (origin, question, right), answer in zip(rounds, answers, strict=True):
        samples.append({"record": origin, "asked": question.text, "said": answer, "answer": right.text})
    return samples


def _first_rounds(model: Cafe, dataset: ContrastiveBatchDataset) -> Iterator[tuple[str, Content, Content]]:
    """Yield the origin, first question and right answer of each dialogue that can be encoded: bad records are skipped.

    The loss skips them too.
    """
    order = dataset.order(0)
    for source, index in zip(order.sources, order.records, strict=True):
        try:
            example = dataset.sources[int(source)].example(int(index), Random(f"sample {source} {index}"))
            if not example.dialogue or len(example.dialogue.turns) < 2:
                continue
            question, right, *_ = [turn.content for turn in example.dialogue.turns]
            model.encode_prompt(question)
        except RecordError:
            continue
        yield example.origin, question, right


def is_better(results: dict[str, float], name: str, best: float | None) -> bool:
    """Return whether a result is higher than the best so far, or lower if its name has a minus sign before it.

    A result that is not finite is never better, and any finite one is better than it.
    """
    metric = name.removeprefix("-")
    if metric not in results:
        known = ", ".join(sorted(results))
        raise RecipeError(f"The evaluation has no result {metric} for metric_for_best_model; it has {known}.")
    value = results[metric]
    if not math.isfinite(value):
        return False
    if best is None or not math.isfinite(best):
        return True
    return value < best if name.startswith("-") else value > best
