"""Worker processes that make data ahead of its use."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


def make_loader(data: Dataset[Item], places: Iterable[Any], workers: int, **options: Any) -> DataLoader[Item]:
    """What a data set holds at some places, in their order, made ahead by `workers` processes.

    They are forks, whatever Python's default is: some processors' classes cannot be pickled, as other ways need.
    """
    context = "fork" if workers else None
    return DataLoader(
        data, batch_size=None, sampler=places, num_workers=workers, multiprocessing_context=context, **options
    )
