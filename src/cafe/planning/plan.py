"""What a run is expected to cost before it starts: parameters, tokens, FLOPs, memory of each GPU, hours.

Everything follows from the sizes of the model (`sizes.py`) and a few words about the data (`workload.py`), by formulas
that can be read in `flops.py` and `memory.py`.
"""

from dataclasses import dataclass

from cafe.attention.registration import tree_implementation
from cafe.checkpoint import resolve_checkpoint
from cafe.lvlm.architectures import load_config, meta_model
from cafe.planning.flops import estimate_flops
from cafe.planning.hardware import GIB, HARDWARE, MFU, RESERVED, Hardware
from cafe.planning.memory import estimate_memory
from cafe.planning.sizes import ModelSizes, measure_model
from cafe.planning.workload import StepWorkload, TypicalSample, estimate_workload
from cafe.training.optimizer import configure_trainable_parameters
from cafe.training.recipe import Recipe, no_negatives_warning

PAIRS = 100_000  # pairs of a run whose recipe does not say how many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Hold the costs of a run.

    Attributes:
        sizes: the model's.
        load: what one step of one GPU reads.
        flops: FLOPs of a step, on all GPUs.
        memory: bytes of one GPU at the peak, by what they are for.
        gpus: the number of GPUs.
        batch: pairs of a step.
        pairs: pairs of the whole run.
        warning: what is likely to be a mistake in the recipe; empty for nothing.
    """

    sizes: ModelSizes
    load: StepWorkload
    flops: float
    memory: dict[str, float]
    gpus: int
    batch: int
    pairs: int
    warning: str = ""

    @property
    def peak(self) -> float:
        """Sum the bytes of one GPU at the peak."""
        return sum(self.memory.values())

    def hours(self, hardware: Hardware, mfu: float = MFU) -> float:
        """Estimate the hours of the whole run, of which the GPU's peak is reached for the share `mfu`."""
        steps = self.pairs / self.batch
        return steps * self.flops / (self.gpus * hardware.flops * mfu) / 3600


def plan(recipe: Recipe, gpus: int = 1, data: TypicalSample | None = None, pairs: int | None = None) -> Plan:
    """Estimate the costs of a recipe.

    Args:
        recipe: the run.
        gpus: the number of GPUs, each one process.
        data: a typical pair.
        pairs: records of the data; the recipe's `max_steps` decides where it is set.

    Raises:
        CafeError: the sizes of the base model are not known, or no formula here covers it.
    """
    data = data or TypicalSample()
    # The model has names and shapes but no weights, so that a model of any size is planned on any machine.
    lvlm = meta_model(load_config(resolve_checkpoint(recipe.model.base)))
    # It decides whether prefixes are shared, and how rows are laid out.
    lvlm.config.get_text_config()._attn_implementation = tree_implementation(recipe.model.attention)
    configure_trainable_parameters(lvlm, recipe.model)
    sizes, load = measure_model(lvlm), estimate_workload(recipe, lvlm, data, gpus)
    batch = recipe.batch_size * gpus
    return Plan(
        sizes=sizes,
        load=load,
        flops=gpus * sum(estimate_flops(sizes, load, recipe.model.gradient_checkpointing).values()),
        memory=estimate_memory(sizes, load, recipe, gpus),
        gpus=gpus,
        batch=batch,
        pairs=_pairs_of_run(recipe, batch, pairs),
        warning=no_negatives_warning(recipe, gpus),
    )


def _pairs_of_run(recipe: Recipe, batch: int, records: int | None) -> int:
    """Count the pairs that the whole run reads."""
    if recipe.max_steps:
        return recipe.max_steps * batch * recipe.optimizer.gradient_accumulation_steps
    if records:
        return records * recipe.num_train_epochs
    return PAIRS


def format_plan(plan: Plan, mfu: float = MFU) -> str:
    """Format a plan as the text that `cafe plan` prints."""
    sizes, load, pairs = plan.sizes, plan.load, plan.batch / plan.gpus
    trained = ", ".join(
        f"{name.replace('_', ' ')} {part.trained / 1e6:,.1f}M" for name, part in sizes.parts.items() if part.trained
    )
    # What would be printed as 0.0 GiB is left out.
    memory = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.memory.items() if size >= 0.05 * GIB)
    gpus, micro_batches = _count(plan.gpus, "GPU"), _count(load.micro_batches, "micro-batch")
    rows = {
        "parameters": f"{sizes.parameters / 1e6:,.1f}M, of which {sizes.trained / 1e6:,.1f}M are trained: {trained}",
        "step": f"{plan.batch} pairs on {gpus}, in {micro_batches} each",
        "pair": f"{load.text.tokens / pairs:,.0f} tokens, {load.crops / pairs:g} crops of {load.patches:,} patches",
        "attention": f"{load.text.seen / pairs:,.0f} (query, key) pairs that are seen, in each layer",
        "FLOPs per step": f"{plan.flops:.3g}",
        "peak per GPU": f"{plan.peak / GIB:.1f} GiB: {memory}",
        "hours": f"for {plan.pairs:,} pairs, at {mfu:.0%} of the peak bfloat16 FLOPs (assumed)",
    }
    lines = [f"{name:14} {text}" for name, text in rows.items()]
    lines += [_hardware_row(plan, hardware, mfu) for hardware in HARDWARE]
    if plan.warning:
        lines.append(plan.warning)
    return "\n".join(lines)


def _hardware_row(plan: Plan, hardware: Hardware, mfu: float) -> str:
    """Format the hours on one kind of GPU, beside what its maker states of it."""
    fits = plan.peak <= hardware.memory - RESERVED
    hours = f"{plan.hours(hardware, mfu):,.1f}" if fits else "does not fit"
    stated = f"{hardware.flops / 1e12:g} TFLOPS, {hardware.memory / 1e9:g} GB: {hardware.source}"
    return f"  {hardware.name:12} {hours:>12}   {stated}"


def _count(number: int, name: str) -> str:
    """Write a number and what it counts."""
    if number == 1:
        return f"1 {name}"
    plural = "es" if name.endswith("h") else "s"
    return f"{number} {name}{plural}"
