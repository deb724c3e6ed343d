"""MMEB-V2's videos as the Hub has them: the rows of 18 datasets, each with columns of its own, as MMEB-eval's records.

Columns, prompts and where a video's frames lie are those of VLM2Vec's code (github.com/TIGER-AI-Lab/VLM2Vec, commit
6e1e1d4: src/data/eval_dataset, experiments/public/eval/video.yaml). The frames are those of the Hub dataset
TIGER-Lab/MMEB-V2, unpacked in video-tasks/frames: a folder a video or clip.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cafe.errors import CafeError

WATCH = "Understand the content of the provided video."
WATCH_CLIP = "Understand the content of the provided video clip."
CHOOSE = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
FIND_MOMENT = "Find the clip that corresponds to the described scene in the given video:"
SEEK = {  # MomentSeeker's prompts, by what is shown beside the words
    "": "Find the clip that corresponds to the given text:",
    ".jpg": "Select the video clip that aligns with the given text and image:",
    ".mp4": "Find the clip that corresponds to the given sentence and video segment:",
}

Row = dict[str, Any]
ListClips = Callable[[str], Sequence[str]]  # the names of the folders in a folder of frames


@dataclass(frozen=True)
class VideoRowFormat:
    """How a dataset's rows are read.

    Attributes:
        columns: what a row must have.
        record: a row as a record of MMEB-eval, in which the first `right` candidates are right.
        rows: how many are taken, the first ones; all if None.
    """

    columns: tuple[str, ...]
    record: Callable[[Row, ListClips], Row]
    rows: int | None = None


def _record(asked: str, shown: str, candidates: Iterable[tuple[str, str]], right: int = 1) -> Row:
    texts, pictures = zip(*candidates, strict=True)
    return {"qry_text": asked, "qry_img_path": shown, "tgt_text": texts, "tgt_img_path": pictures, "right": right}


def _answers(asked: str, shown: str, right: str, others: Iterable[str]) -> Row:
    return _record(asked, shown, [(text, "") for text in (right, *others)])


def _classified(folder: str, instruction: str, *others: str, rows: int | None = None) -> VideoRowFormat:
    """A video finds its class: among those of all rows, or those of its own in a further column."""

    def record(row: Row, clips: ListClips) -> Row:
        wrong = [label for column in others for label in row[column]]
        return _answers(instruction, f"{folder}/{row['video_id']}", row["pos_text"], wrong)

    return VideoRowFormat(("video_id", "pos_text", *others), record, rows)


def _found(folder: str, instruction: str, video: str, caption: str) -> VideoRowFormat:
    """A caption, of several the first, finds its video among those of all rows."""

    def record(row: Row, clips: ListClips) -> Row:
        said = row[caption] if isinstance(row[caption], str) else row[caption][0]
        return _record(f"{instruction} {said}", "", [(WATCH, f"{folder}/{_stem(row[video])}")])

    return VideoRowFormat((video, caption), record)


def _asked(video: str, columns: Sequence[str], question: Callable[[Row], tuple[str, list[str], int]]) -> VideoRowFormat:
    """A question about a video finds its answer among the options.

    Args:
        video: the folder of its frames, a template of the row's columns.
        columns: of the row.
        question: what is asked, the options, and the number of the right one.
    """

    def record(row: Row, clips: ListClips) -> Row:
        asked, options, right = question(row)
        others = [option for number, option in enumerate(options) if number != right]
        return _answers(f"{CHOOSE} {asked}", video.format(**row), options[right], others)

    return VideoRowFormat(tuple(columns), record)


def _moment(folder: str) -> VideoRowFormat:
    """A sentence and a video find the clip that shows it, among the clips that lie beside the video."""

    def record(row: Row, clips: ListClips) -> Row:
        place = f"{folder}/{_stem(row['video_path'])}"
        names = sorted(set(clips(place)) - {"query"}, key=lambda name: (not name.startswith("positive"), name))
        if not names or not names[0].startswith("positive"):
            raise CafeError(f"The frames in {place} have no folder of the clip that is right (positive...).")
        candidates = [(WATCH, f"{place}/{name}") for name in names]
        return _record(f"{FIND_MOMENT} {row['query']}", f"{place}/query", candidates)

    return VideoRowFormat(("query", "video_path"), record)


def _sought(folder: str) -> VideoRowFormat:
    """Words, alone or with a picture or a video, find a clip; several may be right."""

    def frames(video: str) -> str:
        return f"{folder}/video_frames/{video.partition('.mp4')[0].replace('/', '_')}"

    def record(row: Row, clips: ListClips) -> Row:
        shown = row["input_frames"] or ""
        kind = Path(shown).suffix if Path(shown).suffix in SEEK else ""
        place = {"": "", ".jpg": f"{folder}/query_{shown}", ".mp4": frames(shown)}[kind]
        right, wrong = ([frames(clip["output_path"]) for clip in row[f"{side}_frames"]] for side in _SIDES)
        candidates = [(WATCH_CLIP, clip) for clip in (*right, *wrong)]
        return _record(f"{SEEK[kind]} {row['query']}", place, candidates, len(right))

    return VideoRowFormat(("query", "input_frames", *(f"{side}_frames" for side in _SIDES)), record)


_SIDES = ("positive", "negative")


def _stem(video: Any) -> str:
    return Path(str(video)).stem


def _lettered(options: Sequence[str]) -> list[str]:
    """Options without their letters: "A. a dog." is "a dog"."""
    return [option[option.find(". ") :].strip(". ") for option in options]


def _as_list(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, "Options:", *(f"({chr(65 + at)}) {option}" for at, option in enumerate(options))])


def _video_mme(row: Row) -> tuple[str, list[str], int]:
    return "\n".join([row["question"], *row["options"]]), _lettered(row["options"]), "ABCD".index(row["answer"])


def _next_qa(row: Row) -> tuple[str, list[str], int]:
    options = [row[f"a{number}"] for number in range(5)]
    return _as_list(row["question"], options), options, int(row["answer"])


def _ego_schema(row: Row) -> tuple[str, list[str], int]:
    return row["question"] + " ".join(row["option"]), _lettered(row["option"]), int(row["answer"])


def _mv_bench(row: Row) -> tuple[str, list[str], int]:
    options = [f"({chr(65 + at)}) {option}" for at, option in enumerate(row["candidates"])]
    return _as_list(row["question"], row["candidates"]), options, list(row["candidates"]).index(row["answer"])


def _activity_net(row: Row) -> tuple[str, list[str], int]:
    options = ["yes", "no"]
    return row["question"] + "? (A) yes; (B) no.", options, options.index(row["answer"])


FORMATS = {
    "K700": _classified("video_cls/K700", "Recognize the category of the video content."),
    "SmthSmthV2": _classified(
        "video_cls/SSv2",
        "What actions or object interactions are being performed by the person in the video?",
        "neg_text",  # which holds the right one too
        rows=1000,
    ),
    "HMDB51": _classified(
        "video_cls/HMDB51", "What actions or objects interactions are the person in the video doing?"
    ),
    "UCF101": _classified(
        "video_cls/UCF101", "What activities or sports are being performed by the person in the video?"
    ),
    "Breakfast": _classified(
        "video_cls/Breakfast", "Recognize the breakfast type that the person is cooking in the video. "
    ),
    "DiDeMo": _found(
        "video_ret/DiDeMo", "Find a video that includes the following described scenes:", "video", "caption"
    ),
    "MSR-VTT": _found(
        "video_ret/MSR-VTT", "Find a video that contains the following visual content:", "video_id", "caption"
    ),
    "MSVD": _found(
        "video_ret/MSVD", "Find the video snippet that corresponds to the given summary:", "video_id", "caption"
    ),
    "VATEX": _found("video_ret/VATEX", "Select a video that fits the description provided:", "videoID", "enCap"),
    "YouCook2": _found(
        "video_ret/YouCook2",
        "Find a video that demonstrates the following action while making a recipe:",
        "id",
        "sentence",
    ),
    "QVHighlight": _moment("video_mret/QVHighlight"),
    "Charades-STA": _moment("video_mret/Charades_STA"),
    "MomentSeeker": _sought("video_mret/MomentSeeker"),
    "Video-MME": _asked("video_qa/Video-MME/{videoID}", ("videoID", "question", "options", "answer"), _video_mme),
    "NExTQA": _asked(
        "video_qa/NExTQA/{video}", ("video", "question", "answer", "a0", "a1", "a2", "a3", "a4"), _next_qa
    ),
    "EgoSchema": _asked("video_qa/EgoSchema/{video_idx}", ("video_idx", "question", "option", "answer"), _ego_schema),
    "MVBench": _asked(
        "video_qa/MVBench/{subset}/{video}", ("subset", "video", "question", "candidates", "answer"), _mv_bench
    ),
    "ActivityNetQA": _asked(
        "video_qa/ActivityNetQA/v_{video_name}", ("video_name", "question", "answer"), _activity_net
    ),
}
"""The 18 datasets, by the names that files and the leaderboard have."""


def records(name: str, rows: Sequence[Row], data: Path, source: Path, folders: Sequence[str]) -> list[Row]:
    """The rows of a Hub dataset as records of MMEB-eval.

    Args:
        name: the dataset's.
        rows: its rows.
        data: the folder of evaluation files.
        source: the file of the rows.
        folders: where frames may lie, under `data`.

    Raises:
        CafeError: a row is not of the dataset's form, or there are no clips.
    """
    form = FORMATS[name]

    def clips(place: str) -> list[str]:
        found = next((data / folder / place for folder in folders if (data / folder / place).is_dir()), None)
        if found is None:
            places = ", ".join(str(data / folder) for folder in folders)
            raise CafeError(f"The folder of frames {place}, which {source} names, is in none of {places}.")
        return [path.name for path in found.iterdir() if path.is_dir()]

    done = []
    for number, row in enumerate(rows[: form.rows]):
        try:
            done.append(form.record(row, clips))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CafeError(f"Record {number} of {source} is no row of {name}: {error!r}.") from None
    return done
