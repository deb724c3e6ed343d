"""The schema of a recipe, the YAML file that describes one run: a tree of frozen dataclasses.

Each field declares its type, its default and the range of its values, and `Attributes` documents it; the reference
page of recipes is generated from these. `recipe_io.py` reads recipes from files.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

from cafe.content import PILLOW_MAX_PIXELS, ImageLimits
from cafe.data.batch import MicroBatchSize
from cafe.data.mixture import Mixture
from cafe.data.source import Source
from cafe.errors import RecipeError
from cafe.losses import ContrastiveConfig
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.families import PartName
from cafe.lvlm.prompts import Prompts
from cafe.utils.paths import expand_home
from cafe.utils.ranges import Above, AtLeast, Below, Between, HalfOpen, check_ranges

# What `model.precision` may be where frozen weights are not held in float32.
PRECISIONS_BY_FROZEN_DTYPE = {"bf16": ("bf16",), "fp16": ("fp16",), "4bit": ("bf16", "fp16")}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Choose the base model, and how its weights are held, computed with and trained.

    Attributes:
        base: The base model: a local directory, a Hub id, or "scenes" for the tiny model that ships with the package.
        precision: "fp32", or mixed precision over float32 weights: "bf16", or "fp16" with loss scaling, for GPUs
            without bfloat16.
        frozen_weights_dtype: The precision in which frozen weights are held. "4bit" quantizes the language model alone
            and needs bitsandbytes.
        attention: The attention implementation, by its name in transformers.
        max_length: The maximum number of tokens in a sequence.
        gradient_checkpointing: Recompute activations in the backward pass, to save memory where the activations of
            even a small micro-batch do not fit.
        compile: Compile the layers with torch.compile: the first steps take minutes, later ones are faster.
        shard: Shard weights, gradients and optimizer state over the processes (FSDP2) instead of replicating them.
        freeze: The parts of the model that are not trained.
        adapter: Train LoRA or DoRA matrices instead of the weights; null trains the weights.
        vision_cache: A directory that caches the outputs of a frozen vision tower for each image; empty for none.
        share_prefixes: Compute common prefixes of an example's branches once, in families that support it.
        max_row_tokens: The maximum number of tokens in a row of packed branches; null for twice the model's hidden
            size.
        max_image_pixels: The maximum area of an image in pixels, above which it is resized; null for the model's own.
        image_grids: The (rows, columns) grids of crops into which an image may be cut, in families that do so
            (anyres); empty for the model's own.
    """

    base: str
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    frozen_weights_dtype: Literal["fp32", "bf16", "fp16", "4bit"] = "fp32"
    attention: str = "sdpa"
    max_length: Annotated[int, Above(0)] = 32768
    gradient_checkpointing: bool = False
    compile: bool = False
    shard: bool = False
    freeze: tuple[PartName, ...] = ()
    adapter: LoraSettings | None = None
    vision_cache: str = ""
    share_prefixes: bool = True
    max_row_tokens: Annotated[int | None, Above(0)] = None
    max_image_pixels: Annotated[int | None, Above(0)] = None
    image_grids: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        expand_home(self, "base", "vision_cache")
        check_ranges(self, "model")
        self._check_frozen_weights_dtype()
        self._check_trainable_parts()

    def _check_frozen_weights_dtype(self) -> None:
        """Check that the dtype of frozen weights goes with the settings that depend on it."""
        dtype = self.frozen_weights_dtype
        if dtype == "fp32":
            return
        precisions = PRECISIONS_BY_FROZEN_DTYPE[dtype]
        if self.precision not in precisions:
            raise RecipeError(
                f"model.frozen_weights_dtype: {dtype} goes with model.precision: {' or '.join(precisions)}."
            )
        # Quantized weights take no gradient.
        freezes_language_model = self.adapter or "language_model" in self.freeze
        if dtype == "4bit" and not freezes_language_model:
            raise RecipeError(
                "model.frozen_weights_dtype: 4bit needs model.adapter, or language_model in model.freeze."
            )
        if self.shard:
            raise RecipeError(
                "model.frozen_weights_dtype goes without model.shard, which wants a layer's weights of one precision."
            )

    def _check_trainable_parts(self) -> None:
        """Check that something is left to train, and that only one setting says what."""
        if self.adapter and self.freeze:
            raise RecipeError("model.freeze goes without model.adapter, which freezes every part itself.")
        if set(self.freeze) == set(get_args(PartName)):
            raise RecipeError("model.freeze names every part of the model: nothing is left to train.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Choose the training data.

    Attributes:
        sources: The data files, with their image folders and formats.
        mixture: How the sources are mixed.
        num_workers: The number of data-loader processes, which decode images and tokenize; 0 loads in the training
            process.
        max_bad_fraction: The fraction of bad records (0 to 1) above which the run stops.
        allow_changes: Resume a run although its data files have changed since it was saved.
        max_image_bytes: The largest image file that is read, in bytes, and the largest record of a tar; larger ones are
            bad records.
        max_image_pixels: The largest image that is decoded, in pixels; larger ones are bad records. Decoding takes up
            to 15 bytes of memory per pixel.
    """

    sources: tuple[Source, ...]
    mixture: Mixture = field(default_factory=Mixture)
    num_workers: Annotated[int, AtLeast(0)] = 1
    max_bad_fraction: Annotated[float, Between(0, 1)] = 0.01
    allow_changes: bool = False
    max_image_bytes: Annotated[int, Above(0)] = ImageLimits.max_bytes
    max_image_pixels: Annotated[int, Between(1, PILLOW_MAX_PIXELS)] = ImageLimits.max_pixels

    def __post_init__(self) -> None:
        check_ranges(self, "data")
        if not self.sources:
            raise RecipeError("data.sources is empty: there is nothing to train on.")

    @property
    def image_limits(self) -> ImageLimits:
        """The limits on each image, of sources that have none of their own."""
        return ImageLimits(self.max_image_bytes, self.max_image_pixels)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weigh and shape the two losses: loss = lm_weight * L_lm + contrastive_weight * L_con.

    Attributes:
        lm_weight: The weight of the language-modeling loss; 0 trains the contrastive loss alone.
        contrastive_weight: The weight of the contrastive loss; 0 trains the language-modeling loss alone.
        temperature: The temperature of the contrastive loss, or its initial value if it is learned.
        learn_temperature: Train the temperature, as CLIP does.
        symmetric: Contrast targets with queries as well as queries with targets. MMEB training (VLM2Vec) does not, and
            uses a temperature of 0.02.
        hardness_weight: How much more a negative counts the more similar it is to the query; 0 for equal weights. See
            `info_nce`.
        false_negative_margin: Ignore negatives whose cosine similarity exceeds the match's by more than this; null
            ignores none.
        matryoshka_dims: Numbers of leading dimensions that are also contrasted by themselves (Matryoshka
            representation learning); null for the whole embedding alone.
        matryoshka_weights: The weights of `matryoshka_dims` in the mean loss, where the whole embedding has weight 1;
            null for 1 each.
        hard_negatives: Use the records' hard negatives.
        mask_duplicates: Do not contrast pairs that have the same query or target with each other.
        gradient_scaling: "exact", or "published" to divide the contrastive gradient by the number of processes as the
            published code does, for comparison.
    """

    lm_weight: Annotated[float, AtLeast(0)] = 1.0
    contrastive_weight: Annotated[float, AtLeast(0)] = 1.0
    temperature: Annotated[float, Above(0)] = 0.05
    learn_temperature: bool = False
    symmetric: bool = True
    hardness_weight: Annotated[float, AtLeast(0)] = 0.0
    false_negative_margin: float | None = None
    matryoshka_dims: tuple[int, ...] | None = None
    matryoshka_weights: Annotated[tuple[float, ...] | None, AtLeast(0)] = None
    hard_negatives: bool = True
    mask_duplicates: bool = True
    gradient_scaling: Literal["exact", "published"] = "exact"

    def __post_init__(self) -> None:
        check_ranges(self, "objective")
        if self.lm_weight == self.contrastive_weight == 0:
            raise RecipeError("objective.lm_weight and objective.contrastive_weight are both 0: nothing is learned.")
        if not self.matryoshka_weights:
            return
        dims = self.matryoshka_dims or ()
        if len(self.matryoshka_weights) != len(dims):
            raise RecipeError(
                "objective.matryoshka_weights should have one weight for each of objective.matryoshka_dims."
            )

    @property
    def dim_weights(self) -> dict[int, float]:
        """The weight of each number of first dimensions that is contrasted by itself."""
        dims = self.matryoshka_dims or ()
        weights = self.matryoshka_weights or (1.0,) * len(dims)
        return dict(zip(dims, weights, strict=True))

    @property
    def contrastive(self) -> ContrastiveConfig:
        """The options of the contrastive loss: the fields and properties of the same names."""
        options = {option.name: getattr(self, option.name) for option in fields(ContrastiveConfig)}
        return ContrastiveConfig(**options)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Choose the optimizer and its schedule: linear warm-up, then cosine decay to zero.

    Attributes:
        name: "adamw", "adafactor", "muon", "adamw_8bit", "paged_adamw" or "paged_adamw_8bit". Adafactor stores one
            number per row and column instead of AdamW's two per weight, and ignores `beta1`, `beta2` and `epsilon`.
            Muon orthogonalizes the updates of the matrices inside the layers and uses AdamW for the rest. "8bit"
            stores AdamW's state in 8 bits, "paged" moves it to CPU memory when GPU memory is short; both need
            bitsandbytes.
        learning_rate: The peak learning rate, of all parts that have none of their own.
        vision_tower_learning_rate: The peak learning rate of the vision tower; null for `learning_rate`.
        projector_learning_rate: The peak learning rate of the projector; null for `learning_rate`.
        weight_decay: The decoupled weight decay.
        beta1: The decay rate of AdamW's first moment.
        beta2: The decay rate of AdamW's second moment.
        epsilon: The term that is added to AdamW's denominator for numerical stability.
        warmup_ratio: The fraction of all steps (0 to 1) spent on warm-up.
        max_grad_norm: The maximum gradient norm, to which larger gradients are clipped; .inf clips nothing.
        gradient_accumulation_steps: The number of contrastive batches whose gradients are averaged for each optimizer
            step.
    """

    name: Literal["adamw", "adafactor", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    learning_rate: Annotated[float, AtLeast(0)] = 1e-5
    vision_tower_learning_rate: Annotated[float | None, AtLeast(0)] = 2e-6
    projector_learning_rate: Annotated[float | None, AtLeast(0)] = None
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    beta1: Annotated[float, HalfOpen(0, 1)] = 0.9
    beta2: Annotated[float, HalfOpen(0, 1)] = 0.999
    epsilon: Annotated[float, Above(0)] = 1e-8
    warmup_ratio: Annotated[float, Between(0, 1)] = 0.03
    max_grad_norm: Annotated[float, Above(0, finite=False)] = 1.0
    gradient_accumulation_steps: Annotated[int, Above(0)] = 1

    def __post_init__(self) -> None:
        check_ranges(self, "optimizer")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Choose what is evaluated during training, and when.

    Attributes:
        data: A folder of evaluation files, as `cafe evaluate` takes; empty for none.
        sources: Held-out records in the training data's formats, for the validation loss and samples of answers.
        eval_steps: The number of steps between evaluations; 0 for no evaluation.
        limit: The maximum number of records per suite, and of records from `sources`; null for all.
        num_samples: The number of held-out dialogues whose first question the model answers in the log.
    """

    data: str = ""
    sources: tuple[Source, ...] = ()
    eval_steps: Annotated[int, AtLeast(0)] = 0
    limit: Annotated[int | None, Above(0)] = None
    num_samples: Annotated[int, AtLeast(0)] = 4

    def __post_init__(self) -> None:
        expand_home(self, "data")
        check_ranges(self, "evaluation")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Describe one run.

    Attributes:
        output: The directory of the run, for its checkpoints and logs.
        model: The base model, and how it is trained.
        data: The training data.
        prompts: How content is turned into prompts.
        objective: The losses and their weights.
        optimizer: The optimizer and its schedule.
        evaluation: Evaluation during training.
        batch_size: The number of pairs per process in a contrastive batch.
        micro_batch: How much goes through the model at once; the gradient cache makes the result independent of it.
            "auto" measures at the start what fits into memory.
        memory_limit_gib: The maximum memory per process for `micro_batch: auto`, in GiB; null for what is free when
            the run starts.
        num_train_epochs: The number of passes over the data, unless `max_steps` is given.
        max_steps: The number of optimizer steps; null for `num_train_epochs` passes.
        seed: The random seed.
        logging_steps: The number of steps between log lines; 0 logs the first and the last step alone.
        save_steps: The number of steps between saved training states, from which an interrupted run resumes; 0 saves
            none.
        save_total_limit: The number of training states that are kept.
        metric_for_best_model: The evaluation result that selects the best checkpoint, such as
            "retrieval/text_to_image/R@1"; a minus sign in front means that lower is better. Empty keeps no best
            checkpoint.
        max_nonfinite_steps: Steps with a non-finite loss or gradient are skipped; after this many the run stops.
        trackers: Where metrics go in addition to `log.jsonl`: "tensorboard", "wandb" or "trackio"; null for none.
    """

    output: str
    model: ModelConfig
    data: DataConfig
    prompts: Prompts = field(default_factory=Prompts)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_size: Annotated[int, Above(0)] = 32
    micro_batch: MicroBatchSize | Literal["auto"] = field(default_factory=MicroBatchSize)
    memory_limit_gib: Annotated[float | None, Above(0)] = None
    num_train_epochs: Annotated[int, Above(0)] = 1
    max_steps: Annotated[int | None, Above(0)] = None
    seed: Annotated[int, AtLeast(0), Below(2**32)] = 0  # NumPy takes no larger seed
    logging_steps: Annotated[int, AtLeast(0)] = 10
    save_steps: Annotated[int, AtLeast(0)] = 500
    save_total_limit: Annotated[int, Above(0)] = 2
    metric_for_best_model: str = ""
    max_nonfinite_steps: Annotated[int, AtLeast(0)] = 10
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | None = ("tensorboard",)

    def __post_init__(self) -> None:
        expand_home(self, "output")
        check_ranges(self)


def no_negatives_warning(recipe: Recipe, num_processes: int) -> str:
    """Return a warning if a contrastive batch is a single pair, or nothing.

    Args:
        recipe: the run.
        num_processes: how many processes share it.
    """
    is_contrasted = recipe.objective.contrastive_weight > 0
    if not is_contrasted or recipe.batch_size * num_processes > 1:
        return ""
    return (
        "Warning: with batch_size: 1 in one process, no pair has a negative but the hard negatives of its record, and "
        "without these the contrastive loss is 0; gradient_accumulation_steps adds none. Raise batch_size, and set "
        "micro_batch to what fits into memory."
    )


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, as a checkpoint records it."""
    return asdict(recipe)
