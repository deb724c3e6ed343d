"""How hard negatives are mined."""

from dataclasses import dataclass

# Follows the query and a candidate in the judge's prompt; whatever it asks, "yes" has to mean a match.
QUESTION = "Is the last of these a correct match for what comes before it? Answer yes or no."


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Configure how hard negatives are mined.

    Attributes:
        negatives: the maximum number per record; the hardest are taken.
        top: the number of nearest targets considered per query.
        max_positive_ratio: reject candidates whose similarity reaches this fraction of the positive's (NV-Retriever's
            perc-to-pos); null for no such limit.
        margin: reject candidates whose similarity is not below the positive's by this much; null for no such limit.
        judge: drop candidates that the model itself calls a match with at least this probability; null does not ask.
        soft: keep these as soft targets instead, with that probability as their score.
        question: what the judge is asked.
        batch_size: records per forward pass.
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
