"""Loading data ahead of its use, in worker processes."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

Item = TypeVar("Item")


def make_loader(dataset: Dataset[Item], indices: Iterable[Any], num_workers: int, **options: Any) -> DataLoader[Item]:
    """Load items of a dataset by index, in order, ahead of their use.

    Args:
        dataset: the items.
        indices: which to load.
        num_workers: worker processes; 0 loads in this process.
        options: passed to `DataLoader`.
    """
    # Workers are forked, whatever Python's default is: other ways pickle the dataset, and some processors cannot be.
    context = "fork" if num_workers else None
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        multiprocessing_context=context,
        **options,
    )
