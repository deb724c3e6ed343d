"""How hard negatives are mined."""

from dataclasses import dataclass

QUESTION = "Is the last of these a correct match for what comes before it? Answer yes or no."


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """How hard negatives are found.

    Attributes:
        negatives: how many a record gets, at most; the hardest.
        top: how many of the closest targets are looked at.
        max_positive_ratio: a negative's similarity is below this share of the positive's (NV-Retriever's perc-to-pos); null for no
            such limit.
        margin: it is below the positive's by at least this; null for no such limit.
        judge: drop what the model itself says "yes" to with at least this probability; null asks nothing.
        soft: keep it as a soft target instead, with that probability as its score.
        question: what it is asked.
        batch_size: records that go through the model at once.
        workers: processes that decode and tokenize.
    """

    negatives: int = 4
    top: int = 64
    max_positive_ratio: float | None = 0.95
    margin: float | None = None
    judge: float | None = None
    soft: bool = False
    question: str = QUESTION
    batch_size: int = 16
    workers: int = 1
