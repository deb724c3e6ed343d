"""Damage files in random ways and read them: whatever a file holds, nothing but a CafeError may come out.

    python tests/fuzzing.py --minutes 10            # until the time is over; exits with 1 at the first finding
    python tests/fuzzing.py --case 'image PNG:17'   # one case again

A case is the name of a target and a number, from which all that is random follows. Cases that once were findings stand
in `tests/fuzz_cases.txt`, which the tests run.
"""

import argparse
import atexit
import faulthandler
import io
import json
import resource
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from cafe.checkpoint import METADATA_FILE, prompts_from_metadata, read_metadata, resolve_checkpoint
from cafe.content import ImageRef
from cafe.data.records import OpenedSource, open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.evaluation.report.page import write_report
from cafe.evaluation.report.run import ReportRun
from cafe.evaluation.runner import NullModel, evaluate, write
from cafe.evaluation.suites import SUITES
from cafe.images.decoding import decode_array, decode_image
from cafe.model import Cafe
from cafe.scenes.write import write_scenes
from cafe.training.recipe_io import read_recipe

CASES = Path(__file__).with_name("fuzz_cases.txt")
SECONDS_PER_CASE = 30  # a file that takes longer is a finding too
MAX_MEMORY = 8 * 2**30  # bytes; a file that takes more is a finding too
MAX_CHANGES = 6  # of one file
# What fields, and stretches of bytes, are replaced by.
STRANGE_VALUES: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), 10**400, "", " ", "\x00", "\ud800", "\x1b[2J", "\u202e", "../../x",
    "/dev/zero", "http://127.0.0.1/x.png", "file:///dev/zero", "zip://x::y", "data:image/png;base64,AAAA",
    "<image>", "<image>" * 99, "%s{}" * 9, "a" * 70_000, [], {}, [[]], [None], {"a": {}},
    {"bytes": "x", "path": 3}, [[[[[[[["deep"]]]]]]]],
]  # fmt: skip
STRANGE_BYTES = [
    b"",
    b"\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"{",
    b"]",
    b'"',
    b",",
    b"\t",
    b"\r\n",
    b"\xef\xbb\xbf",
    b"[" * 9_000,
]


@dataclass(frozen=True)
class Target:
    """Hold something that reads files.

    Attributes:
        files: the files by name, undamaged; the damaged one is among those whose names `damaged` holds.
        damaged: the names of the files that a case may damage.
        read: reads them from a folder.
    """

    files: Mapping[str, bytes]
    damaged: tuple[str, ...]
    read: Callable[[Path], object]

    @cached_property
    def folder(self) -> Path:
        """Write the files to a folder, which is there until the process ends, and return it."""
        folder = Path(_folders.enter_context(tempfile.TemporaryDirectory()))
        for file, data in self.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        return folder


_folders = ExitStack()
atexit.register(_folders.close)


def change_bytes(data: bytes, rng: Random) -> bytes:
    """Change a file somewhere: cut, repeat, overwrite, flip or insert."""
    start, stop = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    stop = min(stop, start + rng.choice([1, 4, 64, len(data)]))
    match rng.randrange(5):
        case 0:
            return data[:start] + data[stop:]
        case 1:
            return data[:stop] + data[start:]
        case 2:
            return data[:start] + rng.choice(STRANGE_BYTES) + data[stop:]
        case 3:
            return (
                data[:start]
                + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:stop][:64])
                + data[start + 64 :]
            )
    return data[:start] + rng.choice(STRANGE_BYTES) + data[start:]


def change_json(value: Any, rng: Random) -> Any:
    """Change one value within JSON: replace it, drop it, or go deeper."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(STRANGE_VALUES)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rng.random() < 0.1:
        del changed[key]
    else:
        changed[key] = change_json(value[key], rng)
    return changed


def damage(name: str, data: bytes, rng: Random) -> bytes:
    """Damage a file: one of JSON, or of JSON lines, by its values or its bytes, other files by their bytes."""
    is_json = ".json" in name and rng.random() < 0.7
    if is_json:
        lines = data.splitlines()
        has_lines = len(lines) > 1 and lines[0].endswith(b"}")
        value = [json.loads(line) for line in lines] if has_lines else json.loads(data)
        for _ in range(rng.randint(1, MAX_CHANGES)):
            value = change_json(value, rng)
        rows = value if has_lines and isinstance(value, list) else [value]
        return "\n".join(map(json.dumps, rows)).encode()
    for _ in range(rng.randint(1, MAX_CHANGES)):
        data = change_bytes(data, rng)
    return data


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """Encode a small image."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def image_targets() -> Iterator[tuple[str, Target]]:
    """Make a target of every kind of image, and of several modes of PNG, JPEG and TIFF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("PNG", "RGB", {}), ("PNG", "P", {"transparency": 0}), ("PNG", "LA", {}), ("PNG", "I;16", {}), ("PNG", "1", {}),
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True}),
        ("WEBP", "RGBA", {"exif": exif}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("PPM", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "F", {}), ("AVIF", "RGB", {}), ("JPEG2000", "RGB", {}),
    ]  # fmt: skip
    for kind, mode, options in kinds:
        try:
            data = encoded(kind, mode, **options)
        except (KeyError, OSError, ValueError):
            continue  # this Pillow cannot write it
        yield f"image {kind} {mode}", Target({"image": data}, ("image",), read_image)


def read_image(folder: Path) -> None:
    """Decode an image from a file and from bytes, at full and at reduced size."""
    path = folder / "image"
    decoders = (decode_image, partial(decode_array, min_side=4))
    read_all(partial(decode, ref) for ref in (ImageRef(path), ImageRef(path.read_bytes())) for decode in decoders)


def read_all(reads: Iterable[Callable[[], object]]) -> None:
    """Call all, also behind one that fails; raise the last error if all of them do."""
    results: list[CafeError | None] = []
    for read in reads:
        try:
            read()
            results.append(None)
        except CafeError as error:
            results.append(error)
    if results and all(results):
        raise results[-1]


def record_targets(scenes: Path) -> Iterator[tuple[str, Target]]:
    """Make a target of every kind of file, each of several formats."""
    images = {
        f"images/train/{path.name}": path.read_bytes() for path in sorted((scenes / "images/train").iterdir())[:2]
    }
    names = list(images)
    pairs = [
        {
            "query": f"<image>\nwhat {n}?",
            "query_image": names[n],
            "positive": ["a", "b"],
            "negatives": ["c"],
            "negative_scores": [0.5],
        }
        for n in range(2)
    ]
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    llava = [{"id": str(n), "image": names[n], "conversations": turns} for n in range(2)]
    karpathy = {"images": [{"filename": name, "split": "train", "sentences": [{"raw": "a thing"}]} for name in names]}
    mmeb = [
        {
            "qry": "<|image_1|>\nq",
            "qry_image_path": name,
            "pos_text": "a",
            "pos_image_path": "",
            "neg_text": "b",
            "neg_image_path": "",
        }
        for name in names
    ]
    flat = [{"query_image": name, "positive": "words, and more"} for name in names]
    table = [{"query_image": {"bytes": images[name], "path": name}, "positive": ["a", "b"]} for name in names]
    lines = "\n".join(map(json.dumps, pairs)).encode()
    members = {
        "0.json": json.dumps(flat[0]).encode(),
        "0.png": images[names[0]],
        "1.png": images[names[1]],
        "1.txt": b"words",
    }
    files: list[tuple[str, str, bytes]] = [
        ("pairs.json", "pairs", json.dumps(pairs).encode()),
        ("pairs.jsonl", "pairs", lines),
        ("llava.json", "llava", json.dumps(llava).encode()),
        ("karpathy.json", "karpathy", json.dumps(karpathy).encode()),
        ("mmeb.jsonl", "mmeb", "\n".join(map(json.dumps, mmeb)).encode()),
        ("pairs.csv", "pairs", separated(flat, ",")),
        ("pairs.tsv", "pairs", separated(flat, "\t")),
        ("pairs.parquet", "pairs", parquet(table)),
        ("pairs.tar", "pairs", tar(members)),
    ]  # fmt: skip
    for name, format, data in files:
        yield (
            f"records {name}",
            Target({**images, name: data}, (name,), partial(read_records, name=name, format=format)),
        )


def separated(rows: list[dict[str, str]], delimiter: str) -> bytes:
    """Write a table of text."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    quoted = [delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in line) for line in lines]
    return ("\n".join(quoted) + "\n").encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    """Write a parquet file."""
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def tar(members: Mapping[str, bytes]) -> bytes:
    """Write a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def read_records(folder: Path, name: str, format: Any) -> None:
    """Read every record of a file, and its images."""
    source = open_source(Source(path=str(folder / name), format=format))
    read_all(partial(read_record, source, index) for index in range(min(len(source), 50)))


def read_record(source: OpenedSource, index: int) -> None:
    """Read a record and its images."""
    example = source.example(index, Random(0))
    contents = [example.pair.query, example.pair.target, *example.pair.negatives] if example.pair else []
    contents += [turn.content for turn in example.dialogue.turns] if example.dialogue else []
    for content in contents:
        for ref in content.images:
            decode_image(ref)


def evaluation_targets(scenes: Path) -> Iterator[tuple[str, Target]]:
    """Make a target of every suite that the scenes have files of."""
    paths = [path for path in sorted(scenes.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(scenes)): path.read_bytes() for path in paths}
    for suite in SUITES:
        own = [path for path in suite.find_files(scenes) if path.is_file()]
        if own:
            damaged = tuple(str(path.relative_to(scenes)) for path in own)
            yield f"suite {suite.name}", Target(files, damaged, partial(run_suite, name=suite.name))


def run_suite(folder: Path, name: str) -> None:
    """Run a suite on a folder."""
    evaluate(NullModel(), folder, limit=4, report=lambda line: None, suites=[name])


def result_targets(scenes: Path) -> Iterator[tuple[str, Target]]:
    """Make a target of every file that an evaluation writes, read by the report."""
    with tempfile.TemporaryDirectory() as folder:
        write(evaluate(NullModel(), scenes, limit=4, report=lambda line: None), Path(folder))
        names = [str(path.relative_to(folder)) for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        files = {name: (Path(folder) / name).read_bytes() for name in names}
    files["log.jsonl"] = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}'
    yield "results", Target(files, tuple(files), report_folder)


def report_folder(folder: Path) -> None:
    """Write the report of a run."""
    write_report(folder / "report.html", [ReportRun("run", folder, folder / "log.jsonl")])


def settings_targets() -> Iterator[tuple[str, Target]]:
    """Make targets of a checkpoint's metadata and of a recipe."""
    metadata = {
        "prompts": {"system": "s", "assistant_frame": "open", "chat_template": "chatml"},
        "temperature": 0.05,
        "recipe": {},
    }
    metadata_file = {METADATA_FILE: json.dumps(metadata).encode()}
    yield (
        "metadata",
        Target(metadata_file, (METADATA_FILE,), lambda folder: prompts_from_metadata(read_metadata(folder))),
    )
    # JSON is YAML, so a recipe in JSON is damaged by its values too.
    recipe = {
        "output": "o",
        "batch_size": 2,
        "model": {"base": "b"},
        "data": {"sources": [{"path": "p", "format": "llava"}]},
    }
    recipe_file = {"recipe.json": json.dumps(recipe).encode()}
    yield "recipe", Target(recipe_file, ("recipe.json",), lambda folder: read_recipe(folder / "recipe.json"))


def checkpoint_targets() -> Iterator[tuple[str, Target]]:
    """Make a target of the files of a checkpoint, read by loading it."""
    directory = Path(resolve_checkpoint("scenes"))
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    yield "checkpoint", Target(files, tuple(files), lambda folder: Cafe.load(folder).embed(["a red circle"]))


def make_targets(folder: Path) -> dict[str, Target]:
    """Make all targets; the folder gets a small set of scenes, whose files they hold."""
    write_scenes(folder, train=4, test=16, report=lambda line: None)
    targets = [
        *image_targets(),
        *record_targets(folder),
        *evaluation_targets(folder),
        *result_targets(folder),
        *settings_targets(),
        *checkpoint_targets(),
    ]
    return dict(targets)


def run_case(target: Target, name: str, number: int) -> str | None:
    """Run a case and return what was found: a traceback, or None."""
    rng = Random(f"{name}:{number}")
    chosen = rng.choice(target.damaged)
    path = target.folder / chosen
    path.write_bytes(damage(chosen, target.files[chosen], rng))
    try:
        with time_limit(SECONDS_PER_CASE):
            target.read(target.folder)
    except CafeError:
        return None
    except BaseException:
        return f"{chosen}: {traceback.format_exc()}"
    finally:
        path.write_bytes(target.files[chosen])
    return None


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError where something takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"still reading after {seconds} seconds")

    # Python's handler waits for code in C: what hangs there ends the process, with a traceback.
    faulthandler.dump_traceback_later(2 * seconds, exit=True)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def fuzz(targets: Mapping[str, Target], seconds: float, first: int) -> list[str]:
    """Run cases of all targets in turn until the time is over or ten were findings; return the findings."""
    start, number, findings = time.monotonic(), first, []
    with tqdm(total=round(seconds), unit="s", desc="fuzz") as bar:
        while time.monotonic() - start < seconds and len(findings) < 10:
            for name, target in targets.items():
                finding = run_case(target, name, number)
                if finding:
                    findings.append(f"{name}:{number}\n{finding}")
                    tqdm.write(findings[-1])
            number += 1
            bar.set_postfix(cases=(number - first) * len(targets), findings=len(findings), refresh=False)
            bar.update(min(round(time.monotonic() - start), round(seconds)) - bar.n)
    cases = (number - first) * len(targets)
    print(f"{cases:,} cases of {len(targets)} targets, from number {first}: {len(findings)} findings")
    return findings


def main() -> int:
    """Run one case, or cases until the time is over."""
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    warnings.simplefilter("ignore")  # Pillow's, of damaged images
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--target", default="", help="only targets whose names contain this")
    parser.add_argument("--case", help="run this case alone, as NAME:NUMBER")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        if args.case:
            name, _, number = args.case.rpartition(":")
            finding = run_case(targets[name], name, int(number))
            print(finding or "Nothing but a CafeError.")
            return bool(finding)
        chosen = {name: target for name, target in targets.items() if args.target in name}
        return bool(fuzz(chosen, 60 * args.minutes, args.first))


if __name__ == "__main__":
    sys.exit(main())
