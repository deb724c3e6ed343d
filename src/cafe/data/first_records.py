"""Look at the first records of a run's sources before it starts: do they hold what the run is to train on?"""

import logging
from collections.abc import Callable, Iterable, Sequence

from cafe.content import Example
from cafe.data.quarantine import MIN_ALL_BAD
from cafe.data.records import OpenedSource
from cafe.data.source import Columns, Source
from cafe.errors import CafeError, RecipeError, RecordError
from cafe.utils.text import escape_controls

logger = logging.getLogger(__name__)

NUM_CHECKED_RECORDS = 100  # of each source
MAX_DESCRIBED = 3  # sources in an error


def check_first_records(
    sources: Sequence[OpenedSource],
    positions: Sequence[Iterable[int]],
    read: Callable[[int], Example],
    wanted: Sequence[str],
) -> None:
    """Make sure that the first records hold pairs if these are wanted, and warn if they hold no dialogues.

    Args:
        sources: the opened sources.
        positions: for each source, the positions of its first records in the epoch.
        read: reads the record at a position.
        wanted: what there is a loss on: "pair", "dialogue" or both.

    Raises:
        CafeError: all of a source's first records are bad.
        RecipeError: no record holds a pair and these are wanted, or no record holds anything to train on.
    """
    missing = list(wanted)
    num_read = 0
    for opened, own_positions in zip(sources, positions, strict=True):
        errors: list[str] = []
        num_good = 0
        for position in own_positions:
            try:
                example = read(position)
            except RecordError as error:  # reported once more when its batch is made
                errors.append(str(error))
                continue
            num_good += 1
            missing = [part for part in missing if not getattr(example, part)]
            if not missing:
                break
        # Most often a wrong folder of images or a wrong column.
        if not num_good and len(errors) >= MIN_ALL_BAD:
            name = escape_controls(opened.source.path)
            raise CafeError(f"All of the first {len(errors)} records of {name} are bad. The first: {errors[0]}")
        num_read += num_good
    if num_read and missing:
        _report_missing(missing, wanted, num_read, sources)


def _report_missing(
    missing: Sequence[str], wanted: Sequence[str], num_read: int, sources: Sequence[OpenedSource]
) -> None:
    """Raise an error, or log a warning, about what no record holds.

    A source of pairs without dialogues is usual; the other way round, images were probably not found.

    Raises:
        RecipeError: there are no pairs, or there is nothing at all.
    """
    sentence = f"None of the first {num_read} records holds a {' or a '.join(missing)} to train on."
    if missing == ["dialogue"] and len(wanted) > 1:
        logger.warning("%s A source of pairs makes dialogues of them with answer_prompt.", sentence)
        return
    hints = list(map(_describe_fields, sources[:MAX_DESCRIBED]))
    if "pair" in missing:
        hints.append("To train on dialogues alone, set objective.contrastive_weight to 0.")
    raise RecipeError(" ".join([sentence, *hints]))


def _describe_fields(opened: OpenedSource) -> str:
    """Say which fields a source looks for, and which ones its first record has."""
    source = opened.source
    names = escape_controls(", ".join(opened.field_names()))
    if not source.use_pairs:
        return f"The pairs of {source.path} are not used (use_pairs: false)."
    return (
        f"The format {source.format} looks for {_pair_fields(source)}, and a record of {source.path} has {names}: "
        "name the field in columns if it is among these."
    )


def _pair_fields(source: Source) -> str:
    """Name the fields that make a pair of a record."""
    columns = source.columns
    match source.format:
        case "llava" if columns.image == Columns.image:
            return f"images under {columns.image}, images or video"
        case "llava":
            return f"images under {columns.image} or video"
        case "pairs":
            names = (columns.query, columns.query_image, columns.positive, columns.positive_image)
            return f"pairs under {', '.join(names)}"
    return "pairs under the names of that format"
