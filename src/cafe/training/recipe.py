"""The recipe: one YAML file that is one run, as one tree of frozen dataclasses.

Every field has a type and most have a default; `read_recipe` checks the whole tree at once and names what is wrong in
one sentence, with the nearest right key.
"""

import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cafe.data.batch import MicroBatchSize
from cafe.data.mixture import Mixture
from cafe.data.records import Source
from cafe.errors import CafeError
from cafe.losses import ContrastiveConfig
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.families import PartName
from cafe.lvlm.prompts import Prompts
from cafe.training.precision import AUTOCAST_DTYPES as AUTOCAST_DTYPES


def _check(
    numbers: Any,
    where: str,
    *,
    above_0: Sequence[str] = (),
    from_0: Sequence[str] = (),
    up_to_1: Sequence[str] = (),
    below_1: Sequence[str] = (),
) -> None:
    """Refuses numbers that are out of their range, which begins at 0; null is in every one."""
    for names, wanted, fits in (
        (above_0, "above 0", lambda value: value > 0),
        (from_0, "0 or more", lambda value: value >= 0),
        (up_to_1, "between 0 and 1", lambda value: 0 <= value <= 1),
        (below_1, "0 or more and below 1", lambda value: 0 <= value < 1),
    ):
        for name in names:
            value = getattr(numbers, name)
            if value is not None and not fits(value):
                raise CafeError(f"{where}{name} should be {wanted}, not {value}.")


def _check_sources(sources: Sequence[Source], where: str) -> None:
    for index, source in enumerate(sources):
        _check(source, f"{where}[{index}].", above_0=("max_frames", "shuffle_window"))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained.

    Attributes:
        base: a local directory, a Hub id, or "scenes" for the tiny base model that ships with the package.
        precision: "fp32", or "bf16" or "fp16" for bfloat16's or float16's arithmetic over float32 weights. float16 has
            more digits and less range, and scales the loss for that; it is for GPUs without bfloat16.
        frozen_weights_dtype: the precision in which weights that are not trained are held; "4bit" is for the language
            model's alone and wants bitsandbytes.
        attention: the attention implementation by transformers' name.
        max_length: the longest sequence.
        gradient_checkpointing: compute activations again in the backward pass, to save memory where even those of a
            small micro-batch are too many: of one pair in a model of 7 billion, for example.
        compile: compile the layers (torch.compile): the first steps take minutes, the others less than before.
        shard: spread weights, gradients and optimizer state over the processes (FSDP2); without it each has them all.
        freeze: parts that are not trained.
        adapter: train LoRA or DoRA matrices in place of the weights themselves.
        vision_cache: a directory that keeps what a frozen vision tower makes of each picture; empty for none.
        share_prefixes: read what branches have in common once, where the family can.
        max_row_tokens: the most tokens in a row of trees; null for twice as many as the model is wide.
        max_image_pixels: the largest area at which a picture is read, in pixels; null for the model's own.
        image_grids: the (rows, columns) of crops that a picture may be cut into, in families that do so (anyres).
    """

    base: str
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    frozen_weights_dtype: Literal["fp32", "bf16", "fp16", "4bit"] = "fp32"
    attention: str = "sdpa"
    max_length: int = 32768
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    freeze: tuple[PartName, ...] = ()
    adapter: LoraSettings | None = None
    vision_cache: str = ""
    share_prefixes: bool = True
    max_row_tokens: int | None = None
    max_image_pixels: int | None = None
    image_grids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _check(self, "model.", above_0=("max_length", "max_row_tokens", "max_image_pixels"))
        if self.adapter:
            _check(self.adapter, "model.adapter.", above_0=("rank", "alpha"), below_1=("dropout",))
        wanted = {"bf16": ("bf16",), "fp16": ("fp16",), "4bit": ("bf16", "fp16")}.get(self.frozen_weights_dtype)
        if wanted and self.precision not in wanted:
            raise CafeError(
                f"model.frozen_weights_dtype: {self.frozen_weights_dtype} goes with model.precision: {' or '.join(wanted)}."
            )
        if self.frozen_weights_dtype == "4bit" and not (self.adapter or "language_model" in self.freeze):
            raise CafeError("model.frozen_weights_dtype: 4bit needs model.adapter, or language_model in model.freeze.")
        if self.frozen_weights_dtype != "fp32" and self.shard:
            raise CafeError(
                "model.frozen_weights_dtype goes without model.shard, which wants a layer's weights of one precision."
            )
        if self.adapter and self.freeze:
            raise CafeError("model.freeze goes without model.adapter, which freezes every part itself.")
        if set(self.freeze) == set(get_args(PartName)):
            raise CafeError("model.freeze names every part of the model: nothing is left to train.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What it is trained on.

    Attributes:
        sources: files of records with their folders of pictures.
        mixture: how several sources make one stream.
        num_workers: processes that decode and tokenize.
        max_bad_fraction: the share of bad records (0 to 1) above which the run stops.
    """

    sources: tuple[Source, ...]
    mixture: Mixture = field(default_factory=Mixture)
    num_workers: int = 1
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        _check(self, "data.", from_0=("num_workers",), up_to_1=("max_bad_fraction",))
        if not self.sources:
            raise CafeError("data.sources is empty: there is nothing to train on.")
        _check_sources(self.sources, "data.sources")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """loss = lm_weight * L_lm + contrastive_weight * L_con.

    Attributes:
        temperature: of the contrastive loss; the starting value if learned.
        learn_temperature: train it, as CLIP does.
        symmetric: contrast targets with queries too; MMEB training (VLM2Vec) does not, and takes temperature 0.02.
        hardness_weight: counts a negative more the more it resembles the match; see `info_nce`. 0 for equal weights.
        false_negative_margin: a negative more similar than the match by more than this cosine is left out; null for none.
        matryoshka_dims: numbers of first dimensions that are contrasted by themselves, beside the whole embedding.
        matryoshka_weights: of these in the mean loss, in which the whole embedding weighs 1; null for 1 each.
        hard_negatives: use the records' hard negatives.
        mask_duplicates: pairs with the same target are not each other's negatives.
        gradient_scaling: "published" scales the contrastive gradient by one over the number of processes, as the published code
            does; for comparison.
    """

    lm_weight: float = 1.0
    contrastive_weight: float = 1.0
    temperature: float = 0.05
    learn_temperature: bool = False
    symmetric: bool = True
    hardness_weight: float = 0.0
    false_negative_margin: float | None = None
    matryoshka_dims: tuple[int, ...] | None = None
    matryoshka_weights: tuple[float, ...] | None = None
    hard_negatives: bool = True
    mask_duplicates: bool = True
    gradient_scaling: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        _check(
            self, "objective.", above_0=("temperature",), from_0=("lm_weight", "contrastive_weight", "hardness_weight")
        )
        if not (self.lm_weight or self.contrastive_weight):
            raise CafeError("objective.lm_weight and objective.contrastive_weight are both 0: nothing is learned.")
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka_dims or ()):
            raise CafeError(
                "objective.matryoshka_weights should have one weight for each of objective.matryoshka_dims."
            )
        if (least := min(self.matryoshka_weights or [0])) < 0:
            raise CafeError(f"objective.matryoshka_weights should be 0 or more, not {least}.")

    @property
    def dim_weights(self) -> dict[int, float]:
        """The weight of each number of first dimensions that is contrasted by itself."""
        dims = self.matryoshka_dims or ()
        return dict(zip(dims, self.matryoshka_weights or [1.0] * len(dims), strict=True))

    @property
    def contrastive(self) -> ContrastiveConfig:
        """The options of the contrastive loss: the fields and properties of the same names."""
        options = {option.name: getattr(self, option.name) for option in fields(ContrastiveConfig)}
        return ContrastiveConfig(**options)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedule: warm-up, then a cosine to zero.

    Attributes:
        name: "adafactor" keeps one number a row and a column in place of AdamW's two a weight, and leaves `beta1`,
            `beta2` and `epsilon` aside; "muon" makes the steps of the matrices inside the layers orthogonal, AdamW the
            others; "..._8bit" keeps AdamW's numbers in 8 bits; "paged_..." moves them to the computer's memory where
            the GPU's is short. These last want bitsandbytes.
        learning_rate: of the language model and whatever has none of its own.
        vision_tower_learning_rate, projector_learning_rate: of these parts; null takes `learning_rate`.
        warmup_ratio: share of the steps (0 to 1).
        max_grad_norm: the largest gradient norm.
        gradient_accumulation_steps: contrastive batches whose gradients are averaged before each step.
    """

    name: Literal["adamw", "adafactor", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    learning_rate: float = 1e-5
    vision_tower_learning_rate: float | None = 2e-6
    projector_learning_rate: float | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        rates = ("learning_rate", "vision_tower_learning_rate", "projector_learning_rate", "weight_decay")
        _check(self, "optimizer.", above_0=("epsilon", "max_grad_norm", "gradient_accumulation_steps"), from_0=rates)
        _check(self, "optimizer.", up_to_1=("warmup_ratio",), below_1=("beta1", "beta2"))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training.

    Attributes:
        data: a folder of evaluation files, as `cafe evaluate` takes; empty for none.
        sources: held-out records, in the formats of the training data, for the language loss and samples.
        eval_steps: steps between evaluations; 0 for none.
        limit: records a suite, and records of `sources`; null for all.
        num_samples: the held-out dialogues whose first question the model answers in the log.
    """

    data: str = ""
    sources: tuple[Source, ...] = ()
    eval_steps: int = 0
    limit: int | None = None
    num_samples: int = 4

    def __post_init__(self) -> None:
        _check(self, "evaluation.", above_0=("limit",), from_0=("eval_steps", "num_samples"))
        _check_sources(self.sources, "evaluation.sources")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run.

    Attributes:
        output: where the checkpoint and the logs go.
        batch_size: pairs of a contrastive batch in each process.
        micro_batch: how much of it goes through the model at once; the gradient cache makes up for the cut. "auto"
            measures at the start what fits.
        memory_limit_gib: what a process may take in all under "auto", in GiB; null for what is free when it starts.
        num_train_epochs: passes over the data, unless `max_steps` says when to stop.
        logging_steps: steps between lines of the log; with 0 it tells of the first and the last alone.
        save_steps: steps between saved states of the run, from which it goes on when it breaks off; 0 for none.
        save_total_limit: how many of them are kept.
        metric_for_best_model: the result of the evaluation during training by which the best checkpoint is kept, such as
            "retrieval/text_to_image/R@1"; with a minus sign before it, the lowest is the best. Empty for none.
        max_nonfinite_steps: steps whose loss or gradient is not finite are left out; after so many the run stops.
        trackers: where the log goes beside `log.jsonl`; null for nowhere.
    """

    output: str
    model: ModelConfig
    data: DataConfig
    prompts: Prompts = field(default_factory=Prompts)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: int = 32
    micro_batch: MicroBatchSize | Literal["auto"] = field(default_factory=MicroBatchSize)
    memory_limit_gib: float | None = None
    num_train_epochs: int = 1
    max_steps: int | None = None
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2
    metric_for_best_model: str = ""
    max_nonfinite_steps: int = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | None = ("tensorboard",)

    def __post_init__(self) -> None:
        _check(
            self,
            "",
            above_0=("batch_size", "memory_limit_gib", "num_train_epochs", "max_steps", "save_total_limit"),
            from_0=("seed", "logging_steps", "save_steps", "max_nonfinite_steps"),
        )
        if self.seed >= 2**32:  # NumPy's takes no larger one
            raise CafeError(f"seed should be below {2**32:,}, not {self.seed}.")
        if self.micro_batch != "auto":
            _check(self.micro_batch, "micro_batch.", above_0=("tokens", "crops"))


def read_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe and applies overrides of the form `key=value`, e.g. `optimizer.learning_rate=1e-4`.

    Raises:
        CafeError: the file is missing or not YAML; a key is unknown or missing; a value has the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise CafeError(f"The recipe {path} does not exist.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CafeError(f"The recipe {path} is not UTF-8 text: {error}.") from None
    except yaml.YAMLError as error:
        raise CafeError(f"The recipe {path} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(tree, dict):
        raise CafeError(f"The recipe {path} is not a mapping of keys to values.")
    for override in overrides or []:
        _override(tree, override)
    return _build(Recipe, tree, "", str(path))


def read_source(path: str, overrides: list[str] | None = None) -> Source:
    """A source from the command line: its path, and fields of the form `key=value`, e.g. `format=mmeb`.

    Raises:
        CafeError: a key is unknown or a value has the wrong type.
    """
    tree: dict[str, Any] = {"path": path}
    for override in overrides or []:
        _override(tree, override)
    source: Source = _build(Source, tree, "", "The command line")
    _check(source, "", above_0=("max_frames", "shuffle_window"))
    return source


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, as a checkpoint records it."""
    return asdict(recipe)


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise CafeError(f"The override {override!r} is not of the form key=value.")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise CafeError(f"The override {override!r} goes into {parent}, which is a value and holds no keys.")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise CafeError(f"The override {override!r} is not valid YAML: {str(error).splitlines()[0]}.") from None


def _build(cls: type, tree: Any, where: str, file: str) -> Any:
    """A dataclass from a mapping."""
    if not isinstance(tree, dict):
        raise CafeError(f"{file}: {where.rstrip('.')} should be a mapping, not {tree!r}.")
    hints = get_type_hints(cls)
    for key in tree:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise CafeError(f"{file}: the key {where}{key} is unknown; the nearest is {where}{near[0]}.")
    for entry in fields(cls):
        if entry.default is MISSING and entry.default_factory is MISSING and entry.name not in tree:
            raise CafeError(f"{file}: the key {where}{entry.name} is missing.")
    return cls(**{key: _convert(hints[key], value, where + key, file) for key, value in tree.items()})


def _convert(kind: Any, value: Any, where: str, file: str) -> Any:
    """A value as the type that its field wants."""
    if is_dataclass(kind):
        return _build(kind, value, where + ".", file)  # type: ignore[arg-type]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise CafeError(f"{file}: {where} should be a list, not {value!r}.")
        return tuple(_convert(arguments[0], item, f"{where}[{index}]", file) for index, item in enumerate(value))
    if origin in (Union, types.UnionType):
        if any(get_origin(other) is Literal and value in get_args(other) for other in arguments if value is not None):
            return value
        return None if value is None and type(None) in arguments else _convert(arguments[0], value, where, file)
    if origin is Literal:
        if value not in arguments:
            raise CafeError(f"{file}: {where} should be one of {', '.join(map(str, arguments))}, not {value!r}.")
        return value
    if kind is float and isinstance(value, str):  # YAML reads 1e-5, without a point, as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise CafeError(f"{file}: {where} should be {names[kind]}, not {value!r}.")
    return value
