"""The joint step, read top to bottom as the method (CAFe, arXiv 2503.19900).

Each step embeds the queries and targets of one contrastive batch, reads its dialogues, and follows the gradient of

    loss = lm_weight * L_lm + contrastive_weight * L_con.

A batch too large to go through the model at once is cut into micro-batches, and the contrastive gradient takes the way
of a cache (GradCache, arXiv 2101.06983): embed all without gradient, take the gradient of each embedding, then read the
micro-batches once more and carry it on; but for one, whose graph fits in memory meanwhile and is kept. The result does
not depend on the cut.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch._functorch.config
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from cafe.data.dataset import Batch, MicroBatch
from cafe.errors import CafeError
from cafe.losses import in_batch_accuracy, info_nce, linear_cross_entropy
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.vision_cache import VisionCache
from cafe.packing import PackedBatch
from cafe.training.recipe import AUTOCAST_DTYPES, ObjectiveConfig
from cafe.utils.distributed import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum_,
    exclusive_prefix_sum,
    global_grad_norm,
    raise_oom_on_all_ranks,
    world_size,
)
from cafe.utils.rng import get_device_rng_state, replay_rng

MIN_TEMPERATURE = 0.01  # CLIP's bound on a learned temperature
DROPOUT_ATTRIBUTES = (
    "p",
    "attention_dropout",
    "dropout",
)  # what layers of dropout, language models and vision towers call it


@dataclass
class Losses:
    """Both losses of a batch over all processes, and what the log tells of them.

    `metrics` holds the accuracy of retrieval within the batch and the norm of each loss's own gradient.
    """

    lm: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    temperature: Float[Tensor, ""]
    metrics: dict[str, float] = field(default_factory=dict)


class PackedForward(nn.Module):
    """One pass of the model: all that touches its weights, so that sharded ones are whole within it alone.

    Args:
        lvlm: the model.
        dtype: bfloat16 or float16 to read in it; the losses are taken in float32 all the same.
        language: whether the language loss is trained on; else it has no gradient, which a head would fill with zeros.
    """

    def __init__(self, lvlm: PreTrainedModel, dtype: torch.dtype | None = None, language: bool = True) -> None:
        super().__init__()
        self.lvlm: PreTrainedModel = lvlm
        self.dtype, self.language = dtype, language

    def forward(self, pack: PackedBatch) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]:
        """The embeddings, not yet normalised, and the language loss summed over tokens."""
        with self.autocast():
            embedded, exclusive_prefix_sum = forward_packed(self.lvlm, pack)
            embedded = embedded if embedded.dtype == torch.float64 else embedded.float()
            head = self.lvlm.get_output_embeddings()
            softcap = getattr(self.lvlm.config.get_text_config(), "final_logit_softcapping", None)
            labels = pack.labels.to(exclusive_prefix_sum.device, non_blocking=True)
            with torch.set_grad_enabled(self.language and torch.is_grad_enabled()):
                return embedded, linear_cross_entropy(exclusive_prefix_sum, labels, head.weight, head.bias, softcap)

    def autocast(self) -> AbstractContextManager[None]:
        """Within it, the model computes in `dtype`."""
        return torch.autocast(self.lvlm.device.type, self.dtype, enabled=self.dtype is not None)


class JointStep(nn.Module):
    """A contrastive batch in, both losses out, their gradient left in the parameters.

    Args:
        lvlm: the model.
        objective: the weights and the temperature.
        precision: of the model's arithmetic, as a recipe names it; "fp32" for that of its weights.
        vision: what a frozen vision tower made of pictures before.
        blank: a micro-batch of nothing, where the model is sharded over processes: each must then read as many as any.
    """

    def __init__(
        self,
        lvlm: PreTrainedModel,
        objective: ObjectiveConfig,
        precision: str = "fp32",
        vision: VisionCache | None = None,
        blank: MicroBatch | None = None,
    ) -> None:
        super().__init__()
        torch._functorch.config.donated_buffer = False  # of compiled parts: each loss may follow the same graph
        self.width = lvlm.config.get_text_config().hidden_size
        if wrong := [dim for dim in objective.dim_weights if not 0 < dim < self.width]:
            raise CafeError(
                f"objective.matryoshka_dims: {wrong[0]} is not a prefix of an embedding of {self.width} dimensions."
            )
        self.packed_forward = PackedForward(lvlm, AUTOCAST_DTYPES.get(precision), language=objective.lm_weight > 0)
        self.objective = objective
        self.vision, self.blank = vision, blank
        self.log_temperature = nn.Parameter(
            torch.tensor([math.log(objective.temperature)], dtype=self.dtype),
            requires_grad=objective.learn_temperature,
        )
        if objective.learn_temperature:  # every process has its whole gradient, and gradients are summed
            self.log_temperature.register_hook(lambda grad: grad / world_size())

    @property
    def lvlm(self) -> PreTrainedModel:
        """The model."""
        return self.packed_forward.lvlm

    def forward(self, batch: Batch, share: float = 1.0, measure: bool = False, scale: float = 1.0) -> Losses:
        """Adds the batch's gradient to the parameters'; to be summed over processes.

        Args:
            batch: this process's part of the contrastive batch.
            share: factor on the gradient, to average over several batches.
            measure: fill in `Losses.measured`.
            scale: another factor on the gradient, which the caller divides out of it again; see `LossScale`.
        """
        with self.vision.enabled() if self.vision else nullcontext():
            return self._follow(batch, share, measure, scale)

    def _follow(self, batch: Batch, share: float, measure: bool, scale: float) -> Losses:
        objective, device = self.objective, self.log_temperature.device
        trained = [parameter for parameter in self.lvlm.parameters() if parameter.requires_grad]  # now, while in shards
        micro_batches = self.pad_micro_batches(batch.micro_batches)
        # What is read twice is read in the same rows where dropout is to draw the same.
        whole = len(micro_batches) > 1 and self.lvlm.training and has_dropout(self.lvlm)

        # 1. Embed all queries, targets and hard negatives. The first micro-batch, often the only one, comes last and is
        # read for both losses at once: it keeps its graph, and needs no other forward. Where no process has anything to
        # embed, as when language alone is trained, the others wait for their turn.
        vectors = torch.zeros(
            2 * len(batch.target_ids) + len(batch.negative_owner), self.width, device=device, dtype=self.dtype
        )
        slots = [micro_batch.embedding_slots.to(device, non_blocking=True) for micro_batch in micro_batches]
        embeds = all_reduce_max(len(vectors), device) > 0
        drawn = {}
        with self.oom_guard(device):
            for number, micro_batch in reversed(list(enumerate(micro_batches if embeds else micro_batches[:1]))):
                drawn[number] = get_device_rng_state(device)
                with torch.set_grad_enabled(number == 0):
                    reading = self.read(micro_batch.joint if whole or number == 0 else micro_batch.embedding_only)
                vectors[slots[number]] = reading[0].detach()
        vectors.requires_grad_()

        # 2. Contrast them over all processes, and take the gradient of each.
        if objective.learn_temperature:
            with torch.no_grad():  # not in the graph: what is below the bound could never rise again
                self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
        temperature = self.log_temperature[0].exp()
        contrastive, accuracy = self.contrastive_loss(vectors, batch, temperature, measure)
        if contrastive.requires_grad:
            with self.oom_guard(device):
                (scale * share * objective.contrastive_weight * contrastive).backward()
        pull = torch.zeros_like(vectors) if vectors.grad is None else vectors.grad
        if objective.gradient_scaling == "published":
            pull = pull / world_size()

        # 3. Carry it on into the model, together with the gradient of the language loss.
        tokens = all_reduce_sum_(torch.tensor(batch.num_supervised, device=device)).clamp(min=1)
        gradients = PerLossGradients(
            trained, ("contrastive", "lm") if self.packed_forward.language else ("contrastive",), measure
        )
        lm = vectors.new_zeros(())
        with self.oom_guard(device):
            for number, micro_batch in enumerate(micro_batches):
                if number > 0:
                    with replay_rng(drawn[number], device) if embeds else nullcontext():
                        reading = self.read(micro_batch.joint)
                embedded, said = reading
                lm += said.detach() / tokens
                gradients.backward(
                    contrastive=(embedded * pull[slots[number]]).sum(),
                    lm=scale * share * objective.lm_weight * said / tokens,
                )
                del reading, embedded, said  # before the next is read
        norms = {f"grad_norm_{name}": norm / scale for name, norm in gradients.merge().items()}

        measured = {"accuracy": accuracy.item(), **norms} if measure else {}
        return Losses(all_reduce_sum_(lm), contrastive.detach(), temperature.detach(), measured)

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings."""
        return torch.float64 if self.lvlm.dtype == torch.float64 else torch.float32

    def read(self, pack: PackedBatch) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, ""]]:
        """See `PackedForward`."""
        embedded, said = self.packed_forward(pack)
        return embedded, said

    def pad_micro_batches(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        """These and, where the model is sharded, blank ones: every process follows every other's forwards."""
        if not self.blank:
            return micro_batches
        missing = all_reduce_max(len(micro_batches), self.log_temperature.device) - len(micro_batches)
        return micro_batches + [self.blank] * missing

    def oom_guard(self, device: torch.device) -> AbstractContextManager[None]:
        """For work in which processes do not wait for each other, as those do that share a model."""
        return nullcontext() if self.blank else raise_oom_on_all_ranks(device)

    def contrastive_loss(
        self, vectors: Float[Tensor, "readouts dim"], batch: Batch, temperature: Float[Tensor, ""], measure: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The contrastive loss of all processes' pairs, and the accuracy of retrieval among them; 0 unless measured."""
        pairs = len(batch.target_ids)
        queries, targets, negatives = vectors.split([pairs, pairs, len(batch.negative_owner)])
        target_ids, owners, scores, negative_ids = (
            each.to(vectors.device, non_blocking=True)
            for each in (batch.target_ids, batch.negative_owner, batch.negative_match_prob, batch.negative_ids)
        )
        owners = owners + exclusive_prefix_sum(pairs, vectors.device)
        queries, targets, target_ids = all_gather_rows(queries, targets, target_ids)
        negatives, owners, scores, negative_ids = all_gather_rows(negatives, owners, scores, negative_ids)
        if not len(queries):
            return vectors.new_zeros(()), vectors.new_zeros(())
        config = self.objective.contrastive
        with self.oom_guard(vectors.device):
            loss = info_nce(
                queries,
                targets,
                temperature,
                negatives,
                target_ids=torch.cat([target_ids, negative_ids]),
                negative_owner=owners,
                negative_match_prob=scores,
                config=config,
            )
            own = target_ids if config.mask_duplicates else None
            accuracy = in_batch_accuracy(queries.detach(), targets.detach(), own) if measure else vectors.new_zeros(())
        return loss, accuracy


class PerLossGradients:
    """Collects the gradients of some losses in the parameters; keeps them apart where their norms are wanted.

    Args:
        parameters: that are trained.
        losses: their names, in every process the same: each may have a gradient in some micro-batches or in none.
        separate: keep them apart.
    """

    def __init__(self, parameters: list[nn.Parameter], losses: Sequence[str], separate: bool) -> None:
        self.parameters, self.separate = parameters, separate
        self.by_loss: dict[str, list[Tensor | None]] = {name: [None] * len(parameters) for name in losses}
        self.before = self._swap([None] * len(parameters)) if separate else []

    def backward(self, **losses: Float[Tensor, ""]) -> None:
        """Takes the gradients of some losses of the same graph, and lets the graph go."""
        losses = {name: loss for name, loss in losses.items() if loss.requires_grad}
        if not self.separate:
            if losses:  # a text has none where the projector alone is trained
                torch.stack(list(losses.values())).sum().backward()
            return
        for left, (name, loss) in enumerate(losses.items(), start=1):
            self._swap(self.by_loss[name])
            loss.backward(retain_graph=left < len(losses))
            self.by_loss[name] = self._swap([None] * len(self.parameters))

    def merge(self) -> dict[str, float]:
        """Adds what was kept apart to the parameters' gradients; returns the norm of each."""
        if not self.separate:
            return {}
        norms = {}
        self._swap(self.before)
        for name, sums in self.by_loss.items():
            norms[name] = global_grad_norm(self.parameters, sums).item()
            for parameter, grad in zip(self.parameters, sums, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        return norms

    def _swap(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Puts other gradients into the parameters; returns those that were there."""
        there = [parameter.grad for parameter in self.parameters]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        return there


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward pass in training draws random numbers."""
    rates = (getattr(module, name, 0.0) for module in model.modules() for name in DROPOUT_ATTRIBUTES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)  # a module by such a name has its own
