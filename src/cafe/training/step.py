"""The joint step, read top to bottom as the method (CAFe, arXiv 2503.19900).

Each step embeds the queries and targets of one contrastive batch, runs its dialogues through the language head, and
backpropagates

    loss = lm_weight * L_lm + contrastive_weight * L_con.

A batch that is too large for one pass is cut into micro-batches. The contrastive gradient then goes through a cache
(GradCache, arXiv 2101.06983), in three phases, each a method of `JointStep`:

1. embed without gradient: all micro-batches, except that the first keeps its graph, which fits in memory meanwhile;
2. contrast over all processes, and take the gradient with respect to each embedding;
3. backward through the micro-batches: run each once more and backpropagate its embeddings' gradients and the language
   modeling loss together.

The result does not depend on how the batch was cut.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from cafe.data.batch import Batch, MicroBatch
from cafe.errors import RecipeError
from cafe.losses import in_batch_accuracy, info_nce, linear_cross_entropy
from cafe.losses.contrastive import MIN_TEMPERATURE
from cafe.lvlm.families import logit_softcap
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.vision_cache import VisionCache
from cafe.packing import PackedBatch
from cafe.training.gradients import PerLossGradients
from cafe.training.optimizer import trainable_parameters
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import ObjectiveConfig
from cafe.utils.distributed import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum_,
    exclusive_prefix_sum,
    raise_oom_on_all_ranks,
    world_size,
)
from cafe.utils.rng import get_device_rng_state, replay_rng

# What dropout layers, language models and vision towers call their dropout rate.
DROPOUT_ATTRIBUTES = ("p", "attention_dropout", "dropout")


@dataclass
class Losses:
    """Both losses of a batch over all processes.

    Attributes:
        lm, contrastive: the losses.
        temperature: of the contrastive loss.
        metrics: the accuracy of retrieval within the batch and the norm of each loss's own gradient, if asked for.
    """

    lm: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    temperature: Float[Tensor, ""]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class CachedEmbeddings:
    """What phase 1 leaves for the others.

    Attributes:
        embeddings: of the whole batch, leaves of the contrastive loss's graph.
        slots: for each micro-batch, where its embeddings are among them.
        outputs: of the micro-batches whose graph was kept, by index.
        rng_states: of the generators before each micro-batch that phase 1 ran, by index.
    """

    embeddings: Float[Tensor, "readouts dim"]
    slots: list[Int64[Tensor, " readouts"]]
    outputs: dict[int, tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]]
    rng_states: dict[int, tuple[Tensor, Tensor | None]]


@dataclass
class Contrast:
    """What phase 2 makes of the embeddings: the loss over all processes, and the gradient of this process's own."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    temperature: Float[Tensor, ""]
    embedding_grads: Float[Tensor, "readouts dim"]


class PackedForward(nn.Module):
    """Runs the model once. It is all that touches the weights, so sharded weights are whole within its forward alone.

    Args:
        lvlm: the model.
        dtype: bfloat16 or float16 to compute in; the losses are computed in float32 regardless.
        language: whether the language modeling loss is trained. Otherwise it is computed without gradient: the head
            would get zeros for one.
    """

    def __init__(self, lvlm: PreTrainedModel, dtype: torch.dtype | None = None, language: bool = True) -> None:
        super().__init__()
        self.lvlm: PreTrainedModel = lvlm
        self.dtype, self.language = dtype, language

    def forward(self, pack: PackedBatch) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]:
        """Return the embeddings, not yet normalized, and the language modeling loss summed over tokens."""
        with self.autocast():
            embeddings, hidden = forward_packed(self.lvlm, pack)
            # Similarities and their softmax are computed in float32, or in the float64 of a model that is.
            if embeddings.dtype != torch.float64:
                embeddings = embeddings.float()
            # The loss computes the logits itself, chunk by chunk, instead of the model as a whole.
            head = self.lvlm.get_output_embeddings()
            softcap = logit_softcap(self.lvlm)
            labels = pack.labels.to(hidden.device, non_blocking=True)
            needs_grad = self.language and torch.is_grad_enabled()
            with torch.set_grad_enabled(needs_grad):
                return embeddings, linear_cross_entropy(hidden, labels, head.weight, head.bias, softcap)

    def autocast(self) -> AbstractContextManager[None]:
        """Compute in `dtype` within the context."""
        return torch.autocast(self.lvlm.device.type, self.dtype, enabled=self.dtype is not None)


class JointStep(nn.Module):
    """Computes both losses of a contrastive batch and their gradient.

    It is a module for the sake of its parameters and their names. It has no forward: `forward_backward` runs the model
    and leaves the gradient in the parameters.

    Args:
        lvlm: the model.
        objective: the weights of the losses, and the temperature.
        precision: "fp32", "bf16" or "fp16" to compute in, as a recipe names it; "fp32" takes the weights' own dtype.
        vision: keeps the outputs of a frozen vision tower.
        blank_micro_batch: an empty micro-batch, where the model is sharded: every process must run as many as any.
    """

    def __init__(
        self,
        lvlm: PreTrainedModel,
        objective: ObjectiveConfig,
        precision: str = "fp32",
        vision: VisionCache | None = None,
        blank_micro_batch: MicroBatch | None = None,
    ) -> None:
        super().__init__()
        self.width = lvlm.config.get_text_config().hidden_size
        if wrong := [dim for dim in objective.dim_weights if not 0 < dim < self.width]:
            raise RecipeError(
                f"objective.matryoshka_dims: {wrong[0]} is not a prefix of an embedding of {self.width} dimensions."
            )
        self.packed_forward = PackedForward(lvlm, AUTOCAST_DTYPES.get(precision), language=objective.lm_weight > 0)
        self.objective = objective
        self.vision, self.blank_micro_batch = vision, blank_micro_batch
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(objective.temperature)], dtype=self.dtype),
            requires_grad=objective.learn_temperature,
        )
        if objective.learn_temperature:
            # Gradients are summed over processes, and each process has the temperature's whole one.
            self.log_temperature.register_hook(lambda grad: grad / world_size())

    @property
    def lvlm(self) -> PreTrainedModel:
        """The model."""
        return self.packed_forward.lvlm

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of embeddings."""
        return torch.float64 if self.lvlm.dtype == torch.float64 else torch.float32

    @property
    def device(self) -> torch.device:
        """The device of the step."""
        return self.log_temperature.device

    def forward_backward(
        self, batch: Batch, grad_weight: float = 1.0, log_grad_norms: bool = False, loss_scale: float = 1.0
    ) -> Losses:
        """Add the batch's gradient, still to be summed over processes, to the parameters' and return its losses.

        Args:
            batch: this process's part of the contrastive batch.
            grad_weight: multiplies the gradient, to average over several batches.
            log_grad_norms: fill in `Losses.metrics`.
            loss_scale: also multiplies the gradient; the caller divides it out again, see `LossScale`.
        """
        # FSDP puts whole parameters in the place of sharded ones at the first forward: list them before.
        trained = list(trainable_parameters(self.lvlm).values())
        micro_batches = self.pad_micro_batches(batch.micro_batches)
        factor = loss_scale * grad_weight
        # Within the cache a frozen vision tower runs once per image, though phases 1 and 3 both need its output.
        vision_outputs_kept = self.vision.enabled() if self.vision else nullcontext()
        with vision_outputs_kept:
            cached = self.embed_without_grad(batch, micro_batches)
            contrast = self.contrast(cached.embeddings, batch, factor, log_grad_norms)
            loss_names = ("contrastive", "lm") if self.packed_forward.language else ("contrastive",)
            gradients = PerLossGradients(trained, loss_names, separate=log_grad_norms)
            lm = self.backward_micro_batches(batch, micro_batches, cached, contrast.embedding_grads, gradients, factor)
            norms = {f"grad_norm_{name}": norm / loss_scale for name, norm in gradients.merge().items()}
        metrics = {}
        if log_grad_norms:
            # Reading the accuracy waits for the GPU: in logged steps alone.
            metrics = {"accuracy": contrast.accuracy.item(), **norms}
        return Losses(all_reduce_sum_(lm), contrast.loss.detach(), contrast.temperature.detach(), metrics)

    def embed_without_grad(self, batch: Batch, micro_batches: list[MicroBatch]) -> CachedEmbeddings:
        """Phase 1: embed all queries, targets and hard negatives."""
        device = self.device
        num_embeddings = 2 * len(batch.target_ids) + len(batch.negative_owner)
        embeddings = torch.zeros(num_embeddings, self.width, device=device, dtype=self.dtype)
        slots = [micro_batch.embedding_slots.to(device, non_blocking=True) for micro_batch in micro_batches]
        # Dropout draws the same numbers in both passes only if both have the same rows.
        same_rows_twice = len(micro_batches) > 1 and self.lvlm.training and has_dropout(self.lvlm)
        # Where no process has anything to embed, as when language alone is trained, phase 3 runs the others.
        any_embeddings = all_reduce_max(num_embeddings, device) > 0
        to_embed = micro_batches if any_embeddings else micro_batches[:1]

        # The first micro-batch, often the only one, comes last and with its dialogues: its graph serves phase 3 too.
        kept_outputs, rng_states = {}, {}
        with self.oom_guard():
            for index in reversed(range(len(to_embed))):
                micro_batch = to_embed[index]
                rng_states[index] = get_device_rng_state(device)
                keep_graph = index == 0
                with_dialogues = keep_graph or same_rows_twice
                pack = micro_batch.joint if with_dialogues else micro_batch.embedding_only
                with torch.set_grad_enabled(keep_graph):
                    outputs = self.packed_forward(pack)
                embeddings[slots[index]] = outputs[0].detach()
                if keep_graph:
                    kept_outputs[index] = outputs
        # Leaves: phase 2 takes the gradient with respect to them.
        return CachedEmbeddings(embeddings.requires_grad_(), slots, kept_outputs, rng_states)

    def contrast(
        self, embeddings: Float[Tensor, "readouts dim"], batch: Batch, factor: float, log_accuracy: bool
    ) -> Contrast:
        """Phase 2: contrast the embeddings of all processes, and take the gradient of this process's own."""
        objective = self.objective
        if objective.learn_temperature:
            # The bound is set on the parameter: a clamp in the graph would keep it from ever rising again.
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
        temperature = self.log_temperature[0].exp()
        loss, accuracy = self.contrastive_loss(embeddings, batch, temperature, log_accuracy)
        if loss.requires_grad:
            with self.oom_guard():
                (factor * objective.contrastive_weight * loss).backward()
        # No pairs in any process, no gradient.
        embedding_grads = torch.zeros_like(embeddings) if embeddings.grad is None else embeddings.grad
        if objective.gradient_scaling == "published":
            # The published code takes the mean over processes of what each has for its own rows, not the sum.
            embedding_grads = embedding_grads / world_size()
        return Contrast(loss, accuracy, temperature, embedding_grads)

    def contrastive_loss(
        self,
        embeddings: Float[Tensor, "readouts dim"],
        batch: Batch,
        temperature: Float[Tensor, ""],
        log_accuracy: bool,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the contrastive loss of all processes' pairs, and their in-batch accuracy or 0."""
        pairs = len(batch.target_ids)
        queries, targets, negatives = embeddings.split([pairs, pairs, len(batch.negative_owner)])
        query_ids, target_ids, negative_owner, match_prob, negative_ids = (
            each.to(embeddings.device, non_blocking=True)
            for each in (
                *(batch.query_ids, batch.target_ids),
                *(batch.negative_owner, batch.negative_match_prob, batch.negative_ids),
            )
        )
        # Owners are counted within the process: shift them to where its pairs are among all.
        negative_owner = negative_owner + exclusive_prefix_sum(pairs, embeddings.device)
        # Pairs and negatives apart: a process has more or fewer of each than another.
        queries, targets, query_ids, target_ids = all_gather_rows(queries, targets, query_ids, target_ids)
        negatives, negative_owner, match_prob, negative_ids = all_gather_rows(
            negatives, negative_owner, match_prob, negative_ids
        )
        # All records of all processes may be dialogues, or bad.
        if not len(queries):
            return embeddings.new_zeros(()), embeddings.new_zeros(())
        config = self.objective.contrastive
        with self.oom_guard():
            loss = info_nce(
                queries,
                targets,
                temperature,
                negatives,
                query_ids=query_ids,
                target_ids=torch.cat([target_ids, negative_ids]),
                negative_owner=negative_owner,
                negative_match_prob=match_prob,
                config=config,
            )
            if not log_accuracy:
                return loss, embeddings.new_zeros(())
            ids = (query_ids, target_ids) if config.mask_duplicates else (None, None)
            return loss, in_batch_accuracy(queries.detach(), targets.detach(), *ids)

    def backward_micro_batches(
        self,
        batch: Batch,
        micro_batches: list[MicroBatch],
        cached: CachedEmbeddings,
        embedding_grads: Float[Tensor, "readouts dim"],
        gradients: PerLossGradients,
        factor: float,
    ) -> Float[Tensor, ""]:
        """Phase 3: backpropagate both losses through each micro-batch; return this process's part of the LM loss."""
        # The mean over all supervised tokens, of all micro-batches and processes, is not a mean of means.
        num_supervised = all_reduce_sum_(torch.tensor(batch.num_supervised, device=self.device)).clamp(min=1)
        lm = cached.embeddings.new_zeros(())
        with self.oom_guard():
            for index, micro_batch in enumerate(micro_batches):
                outputs = cached.outputs.pop(index, None)
                if outputs is None:
                    outputs = self.forward_again(micro_batch, cached.rng_states.get(index))
                embeddings, lm_loss_sum = outputs
                lm += lm_loss_sum.detach() / num_supervised
                # This sum's gradient with respect to the embeddings is `embedding_grads`.
                gradients.backward(
                    contrastive=(embeddings * embedding_grads[cached.slots[index]]).sum(),
                    lm=factor * self.objective.lm_weight * lm_loss_sum / num_supervised,
                )
                del outputs, embeddings, lm_loss_sum  # frees the graph before the next one is built
        return lm

    def forward_again(
        self, micro_batch: MicroBatch, rng_state: tuple[Tensor, Tensor | None] | None
    ) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]:
        """Run a micro-batch with the random numbers of phase 1; with new ones if it was not run there."""
        replay = replay_rng(rng_state, self.device) if rng_state else nullcontext()
        with replay:
            outputs: tuple[Tensor, Tensor] = self.packed_forward(micro_batch.joint)
        return outputs

    def pad_micro_batches(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """Append blank micro-batches where the model is sharded, so that every process runs as many forwards."""
        if not self.blank_micro_batch:
            return micro_batches
        missing = all_reduce_max(len(micro_batches), self.device) - len(micro_batches)
        return micro_batches + [self.blank_micro_batch] * missing

    def oom_guard(self) -> AbstractContextManager[None]:
        """Return a context in which running out of memory is raised in all processes.

        Processes that share a model cannot use it: they wait for each other within the work.
        """
        if self.blank_micro_batch:
            return nullcontext()
        return raise_oom_on_all_ranks(self.device)


def has_dropout(model: nn.Module) -> bool:
    """Return whether a forward pass in training mode draws random numbers."""
    for module in model.modules():
        for name in DROPOUT_ATTRIBUTES:
            rate = getattr(module, name, 0.0)
            # A submodule by such a name is no rate, but has its own.
            if isinstance(rate, float) and rate > 0:
                return True
    return False
