"""Let the model judge which candidates match after all."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Content, Dialogue, Turn
from cafe.lvlm.forward import compute_logits, forward_packed
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages
from cafe.mining.config import MiningConfig
from cafe.mining.embed import EmbeddedPairs, Examples
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, pack
from cafe.utils.dataloader import make_loader


class _Questions(Dataset[PackedBatch]):
    """About each candidate of some pairs, the question whether it matches."""

    def __init__(
        self, examples: Examples, embedded: EmbeddedPairs, found: list[list[int]], model: Cafe, mining: MiningConfig
    ) -> None:
        self.examples, self.places, self.found = examples, embedded.places, found
        self.chat_processor, self.packing, self.mining = model.chat_processor, model.packing, mining

    def __getitem__(self, numbers: list[int]) -> PackedBatch:
        groups = []
        for number in numbers:
            query = self._pair(number).query
            others = [self._pair(other).target for other in self.found[number]]
            groups.append(questions(query, others, self.chat_processor, self.mining.question))
        return pack(groups, [[]] * len(groups), self.packing)

    def _pair(self, number: int) -> Any:
        return self.examples[self.places[number]].pair


def questions(query: Content, others: Sequence[Content], chat_processor: ChatProcessor, question: str) -> list[Branch]:
    """The prompts that ask of each content whether it matches the query; they share the query's tokens."""
    done = []
    refs = [ref for content in (query, *others) for ref in content.images]
    shown = dict(zip(map(id, refs), chat_processor.decode_images(refs), strict=True))
    for other in others:
        asked = Content((*query.parts, "\n", *other.parts, f"\n{question}"))
        pictures = chat_processor.process_images([shown[id(ref)] for ref in asked.images])
        messages = dialogue_messages(Dialogue((Turn("user", asked),)), chat_processor.prompts)
        done.append(chat_processor.encode_prompt(messages, pictures))
    return done


@torch.inference_mode()
def filter_by_judge(
    model: Cafe,
    examples: Examples,
    embedded: EmbeddedPairs,
    found: list[list[int]],
    mining: MiningConfig,
    threshold: float,
) -> list[dict[int, float]]:
    """The candidates that are kept, and the score of each.

    Those that the model calls matches, because its probability of "yes" is not below the threshold, are dropped, or
    kept with that probability as their score where `mining.soft` says so. The others' is 0.
    """
    asked = [number for number, row in enumerate(found) if row]
    size = max(1, mining.batch_size // 4)
    groups = [asked[start : start + size] for start in range(0, len(asked), size)]
    data = _Questions(examples, embedded, found, model, mining)
    stream = make_loader(data, groups, mining.workers)
    kept: list[dict[int, float]] = [{} for _ in found]
    for numbers, laid in zip(groups, tqdm(stream, desc="judge", unit="batch", total=len(groups)), strict=True):
        hidden, _ = forward_packed(model.lvlm, laid)
        chances = iter(yes_probability(model, hidden).tolist())
        for number in numbers:
            scores = {other: next(chances) for other in found[number]}
            if mining.soft:
                kept[number] = {other: score if score >= threshold else 0.0 for other, score in scores.items()}
            else:
                kept[number] = {other: 0.0 for other, score in scores.items() if score < threshold}
    return kept


def yes_probability(model: Cafe, hidden: Float[Tensor, "questions dim"]) -> Float[Tensor, " questions"]:
    """The probability of "yes" against "no" as the next word, from the hidden state before it."""
    logits = compute_logits(model.lvlm, hidden)
    positive, negative = (_first_tokens(model.chat_processor, word) for word in ("yes", "no"))
    return torch.sigmoid(
        logits[:, sorted(positive - negative)].logsumexp(1) - logits[:, sorted(negative - positive)].logsumexp(1)
    )


def _first_tokens(chat_processor: ChatProcessor, word: str) -> set[int]:
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    return {chat_processor.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}
