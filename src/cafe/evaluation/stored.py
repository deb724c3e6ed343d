"""Read back what `runner.write` wrote into a directory.

The files may be damaged, or come from a stranger. What they hold is checked once, here: every reader raises a
`ValueError` that names the file and says what is wrong with it.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cafe.evaluation.suite import read_marks

T = TypeVar("T")

# What the report shows of each kind of sample: fields with their types, and lists of such.
_HIT = {"right": bool}
SAMPLE_KINDS: dict[str, Any] = {
    "data": str,
    "text_queries": [{"text": str, "hits": [_HIT | {"image": str}]}],
    "image_queries": [{"image": str, "hits": [_HIT | {"text": str}]}],
    "captions": [{"image": str, "said": str, "right": bool}],
    "answers": [{"image": str, "asked": str, "said": str, "answer": str, "right": bool}],
    "histogram": {"bins": [float], "matched": [float], "mismatched": [float]},
}


def read_results(path: Path) -> dict[str, float]:
    """Read `results.json`, without the results that are no number (null, or NaN as older versions wrote it)."""
    results = {}
    for name, value in _load_object(path).items():
        if value is not None and not _is_a(value, float, finite=False):
            raise ValueError(f"{path} has no number under {name!r}")
        if value is not None and math.isfinite(value):
            results[name] = float(value)
    return results


def read_samples(path: Path) -> dict[str, Any]:
    """Read `samples.json`, of which what the report shows is checked."""
    samples = _load_object(path)
    for kind, shape in SAMPLE_KINDS.items():
        if kind in samples and not _has_shape(samples[kind], shape):
            raise ValueError(f"{path} has no samples of the right form under {kind!r}")
    if "histogram" in samples:
        bins, *counts = (len(samples["histogram"][name]) for name in ("bins", "matched", "mismatched"))
        if counts != [bins - 1] * 2:
            raise ValueError(f"{path} has no histogram of as many counts as bins")
    return samples


def read_means(path: Path) -> dict[str, list[str]]:
    """Read `means.json`, which says which results are means of which; a directory need not have it."""
    if not path.is_file():
        return {}
    means = _load_object(path)
    if not all(_has_shape(parts, [str]) for parts in means.values()):
        raise ValueError(f"{path} does not have lists of results")
    return means


def read_embeddings(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of `embeddings.npz`, all of them numbers."""
    try:
        # NumPy reads the arrays when they are asked for, so they are copied before the file is closed.
        with np.load(path) as arrays:
            embeddings = dict(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip file or header makes NumPy raise almost anything
        raise ValueError(f"{path} is damaged ({error})") from None
    if not all(np.issubdtype(array.dtype, np.number) for array in embeddings.values()):
        raise ValueError(f"{path} has an array that does not hold numbers")
    return embeddings


def read_outputs(path: Path) -> list[dict[str, Any]]:
    """Read a file of `outputs/`: rows with marks, which are finite numbers."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        try:
            marks: list[list[Any]] = [mark for _, *mark in read_marks(row)]
        except (KeyError, TypeError, ValueError, AttributeError):
            marks = [[None]]
        if not _has_shape(marks, [[float]]):
            raise ValueError(f"{path} has no marks in line {number}")
    return rows


def read_log(path: Path) -> list[dict[str, float]]:
    """Read a training's log: of each row with a step, what is a finite number."""
    rows = []
    for row in read_json_lines(path):
        numbers = {name: float(value) for name, value in row.items() if _is_a(value, float)}
        if "step" in numbers:
            rows.append(numbers)
    return rows


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object on each line."""
    # `splitlines` would also split at characters that may occur inside a string, such as U+2028.
    lines = filter(str.strip, path.read_text(encoding="utf-8-sig").split("\n"))
    return [_parse_object(line, path) for line in lines]


def read_or_leave_out(read: Callable[[Path], dict[str, T]], path: Path, warn: Callable[[str], Any]) -> dict[str, T]:
    """Read a file of an earlier evaluation, or nothing if it is damaged or missing, which is said in a line."""
    try:
        return read(path)
    except (ValueError, FileNotFoundError) as error:
        warn(f"What {path} held of an earlier evaluation is left out: {error}.")
        return {}


def _load_object(path: Path) -> dict[str, Any]:
    """Load a JSON file that holds an object."""
    return _parse_object(path.read_text(encoding="utf-8-sig"), path)


def _parse_object(text: str, path: Path) -> dict[str, Any]:
    """Parse an object in JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold an object with named values")
    return value


def _has_shape(value: Any, shape: Any) -> bool:
    """Tell whether a value has a type, is a mapping with such fields, or a list of such items."""
    if isinstance(shape, Mapping):
        return isinstance(value, dict) and all(_has_shape(value.get(name), kind) for name, kind in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(item, shape[0]) for item in value)
    return _is_a(value, shape)


def _is_a(value: Any, kind: type, finite: bool = True) -> bool:
    """Tell whether a value has a type. A number may be an integer, fits into a float and, if so wanted, is finite."""
    if kind is not float:
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value)) or not finite
    except OverflowError:  # an integer of hundreds of digits
        return False
