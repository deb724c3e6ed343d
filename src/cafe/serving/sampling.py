"""Choose the next token of each running answer."""

import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from cafe.serving.jobs import EngineError, Sampling

logger = logging.getLogger(__name__)


class TokenChooser:
    """Choose the tokens of one answer.

    Args:
        sampling: how.
        prompt: the tokens before the answer.
        defaults: of the model, of which the repetition penalty is used, as transformers' `generate` does.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], defaults: GenerationConfig) -> None:
        self.sampling = sampling
        self.context = list(prompt)
        # Some models are not usable without the one that their makers set.
        self.penalty = defaults.repetition_penalty or 1.0
        # One for each answer: with a seed, it is the same whoever else is answered.
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    @property
    def takes_likeliest(self) -> bool:
        """Return whether the token with the largest logit is taken, whatever came before."""
        return self.sampling.temperature <= 0 and self.penalty == 1.0

    def sample(self, logits: Float[Tensor, " vocabulary"]) -> int:
        """Choose the next token by its logits, on the CPU in float32."""
        if self.penalty != 1.0:
            penalize = RepetitionPenaltyLogitsProcessor(self.penalty)
            logits = penalize(torch.tensor([self.context]), logits[None])[0]
        if self.sampling.temperature <= 0:
            return int(logits.argmax())
        # Subtracted first, because a small temperature makes large numbers infinite; in float32 it might be zero.
        scaled = (logits - logits.max()).double() / self.sampling.temperature
        probabilities = scaled.softmax(-1)
        if self.sampling.top_p < 1:
            probabilities = keep_nucleus(probabilities, self.sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def append(self, token: int) -> None:
        """Note the token that was taken."""
        self.context.append(token)


def keep_nucleus(probabilities: Float[Tensor, " vocabulary"], top_p: float) -> Float[Tensor, " vocabulary"]:
    """Set to zero all but the likeliest tokens that together have a probability, of which at least one is kept."""
    ordered, order = probabilities.sort(descending=True)
    # A token is kept if those before it do not reach the probability: the one that crosses it is in.
    before = ordered.cumsum(0) - ordered
    ordered[(before >= top_p) & (torch.arange(len(ordered)) > 0)] = 0
    return torch.zeros_like(probabilities).scatter_(0, order, ordered)


def choose_tokens(
    logits: Float[Tensor, "chats vocabulary"], choosers: Sequence[TokenChooser]
) -> list[int | EngineError]:
    """Choose the next token of each chat; an error for those whose logits are not numbers."""
    largest, likeliest = logits.max(dim=-1)
    # One transfer for all, which a GPU is waited for.
    finite, tokens = torch.stack([largest.isfinite().long(), likeliest]).tolist()
    chosen: list[int | EngineError] = []
    for row, chooser in enumerate(choosers):
        if not finite[row]:
            chosen.append(EngineError("The model's logits are not finite."))
        elif chooser.takes_likeliest:
            chosen.append(tokens[row])
        else:
            chosen.append(_sample_or_fail(chooser, logits[row].float().cpu()))
    return chosen


def _sample_or_fail(chooser: TokenChooser, logits: Float[Tensor, " vocabulary"]) -> int | EngineError:
    """Choose the next token of one chat; its error is returned, so that the others get theirs."""
    try:
        return chooser.sample(logits)
    except Exception:
        logger.exception("No token can be chosen.")
        return EngineError("No token can be chosen.")
