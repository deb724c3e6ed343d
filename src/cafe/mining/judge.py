"""Let the model's generative half judge which candidates match after all, and choose negatives."""

from collections.abc import Sequence
from itertools import chain, islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Content, Dialogue, Pair, Turn
from cafe.lvlm.forward import compute_logits, forward_packed
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages
from cafe.mining.config import MiningConfig
from cafe.mining.embed import EmbeddedPairs, Examples
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, pack
from cafe.utils.dataloader import make_loader


def select_negatives(
    model: Cafe, examples: Examples, embedded: EmbeddedPairs, candidates: list[list[int]], config: MiningConfig
) -> list[dict[int, float]]:
    """Choose the hard negatives of each pair, and the score of each; ask the judge first if `config.judge` is set.

    Args:
        model: the judge.
        examples: all records.
        embedded: their pairs.
        candidates: for each pair the numbers of pairs whose targets may be its negatives, the hardest first.
        config: how many to choose, and how to judge.

    Returns:
        For each pair the chosen of its candidates, in order, and their scores: 0, or of soft targets the probability
        that they match.
    """
    scored = [dict.fromkeys(row, 0.0) for row in candidates]
    if config.judge is not None:
        # Judging is the slow part, so only twice as many as are wanted are judged.
        shortlists = [row[: 2 * config.negatives] for row in candidates]
        scored = filter_by_judge(model, examples, embedded, shortlists, config, config.judge)
    return [dict(islice(row.items(), config.negatives)) for row in scored]


@torch.inference_mode()
def filter_by_judge(
    model: Cafe,
    examples: Examples,
    embedded: EmbeddedPairs,
    candidates: list[list[int]],
    config: MiningConfig,
    threshold: float,
) -> list[dict[int, float]]:
    """Return for each pair the candidates that remain, and the score of each.

    A candidate is a match if the model's probability of "yes" reaches the threshold. Matches are dropped or, with
    `config.soft`, kept with that probability as their score; all others have the score 0.
    """
    # Pairs without candidates have no prompt, and an empty pack is none.
    judged = [number for number, row in enumerate(candidates) if row]
    size = max(1, config.batch_size // 4)  # a group holds a prompt per candidate
    groups = [judged[start : start + size] for start in range(0, len(judged), size)]
    stream = make_loader(_JudgeDataset(examples, embedded, candidates, model, config), groups, config.workers)

    result: list[dict[int, float]] = [{} for _ in candidates]
    for group, packed in zip(groups, tqdm(stream, desc="judge", unit="batch", total=len(groups)), strict=True):
        hidden, _ = forward_packed(model.lvlm, packed)
        probabilities = iter(yes_probability(model, hidden).tolist())
        # Answers are in the order of the prompts: for each pair of the group, one per candidate.
        for number in group:
            for candidate in candidates[number]:
                probability = next(probabilities)
                if config.soft:
                    result[number][candidate] = probability if probability >= threshold else 0.0
                elif probability < threshold:
                    result[number][candidate] = 0.0
    return result


class _JudgeDataset(Dataset[PackedBatch]):
    """Pack the judge's prompts for the candidates of some pairs."""

    def __init__(
        self,
        examples: Examples,
        embedded: EmbeddedPairs,
        candidates: list[list[int]],
        model: Cafe,
        config: MiningConfig,
    ) -> None:
        self.examples, self.record_keys, self.candidates = examples, embedded.record_keys, candidates
        self.chat_processor, self.packing, self.question = model.chat_processor, model.packing, config.question

    def __getitem__(self, numbers: list[int]) -> PackedBatch:
        groups = []
        for number in numbers:
            query = self._pair(number).query
            targets = [self._pair(candidate).target for candidate in self.candidates[number]]
            groups.append(judge_branches(query, targets, self.chat_processor, self.question))
        return pack(groups, [[]] * len(groups), self.packing)

    def _pair(self, number: int) -> Pair:
        pair = self.examples[self.record_keys[number]].pair
        assert pair is not None  # records without a pair are not embedded
        return pair


def judge_branches(
    query: Content, targets: Sequence[Content], chat_processor: ChatProcessor, question: str
) -> list[Branch]:
    """Encode the prompts that ask of each target whether it matches the query; they share the query's tokens."""
    # All images are decoded at once, the query's once for all targets.
    refs = list(chain.from_iterable(content.images for content in (query, *targets)))
    images = dict(zip(map(id, refs), chat_processor.decode_images(refs), strict=True))
    branches = []
    for target in targets:
        # The query first, so that the prompts share all of it.
        content = Content((*query.parts, "\n", *target.parts, f"\n{question}"))
        processed = chat_processor.process_images([images[id(ref)] for ref in content.images])
        messages = dialogue_messages(Dialogue((Turn("user", content),)), chat_processor.prompts)
        branches.append(chat_processor.encode_prompt(messages, processed))
    return branches


def yes_probability(model: Cafe, hidden: Float[Tensor, "questions dim"]) -> Float[Tensor, " questions"]:
    """Return the probability of "yes" against "no" as the next word, given the hidden state before it."""
    logits = compute_logits(model.lvlm, hidden)
    yes = _first_tokens(model.chat_processor, "yes")
    no = _first_tokens(model.chat_processor, "no")
    # A token that both words begin with, such as a lone space, says nothing.
    yes_logit = logits[:, sorted(yes - no)].logsumexp(1)
    no_logit = logits[:, sorted(no - yes)].logsumexp(1)
    return torch.sigmoid(yes_logit - no_logit)


def _first_tokens(chat_processor: ChatProcessor, word: str) -> set[int]:
    """Return the tokens that an answer of this word may begin with."""
    # Models differ in which of these they say, by their templates and tokenizers.
    spellings = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
    encoded = chat_processor.tokenizer(spellings, add_special_tokens=False)["input_ids"]
    return {tokens[0] for tokens in encoded}
