"""MMEB-V2's videos as on the Hub: the rows of 18 datasets, each with columns of its own, as records of MMEB-eval.

Columns, prompts and the folders of frames are those of VLM2Vec's code (github.com/TIGER-AI-Lab/VLM2Vec, commit
6e1e1d4: src/data/eval_dataset, experiments/public/eval/video.yaml). The frames are those of the Hub dataset
TIGER-Lab/MMEB-V2, unpacked in video-tasks/frames: a folder for each video or clip.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cafe.errors import CafeError
from cafe.evaluation.suites.mmeb.datasets import find_in_folders, list_folders
from cafe.utils.text import escape_controls, shorten

WATCH = "Understand the content of the provided video."
WATCH_CLIP = "Understand the content of the provided video clip."
CHOOSE = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
FIND_MOMENT = "Find the clip that corresponds to the described scene in the given video:"
SEEK_MOMENT = {  # MomentSeeker's prompts, by what comes with the words
    "": "Find the clip that corresponds to the given text:",
    ".jpg": "Select the video clip that aligns with the given text and image:",
    ".mp4": "Find the clip that corresponds to the given sentence and video segment:",
}

Row = dict[str, Any]
ListClips = Callable[[str], Sequence[str]]  # the names of the folders in a folder of frames


@dataclass(frozen=True)
class VideoRowFormat:
    """Say how a dataset's rows are read.

    Attributes:
        columns: what a row must have.
        to_record: turns a row into a record of MMEB-eval, in which the first `right` candidates are right.
        max_rows: how many are used, the first ones; all if None.
    """

    columns: tuple[str, ...]
    to_record: Callable[[Row, ListClips], Row]
    max_rows: int | None = None


def _record(query: str, image: str, candidates: Iterable[tuple[str, str]], num_right: int = 1) -> Row:
    """Make a record of MMEB-eval.

    Args:
        query: the query's text.
        image: the query's image or folder of frames; empty if it has none.
        candidates: the text and the folder of frames of each candidate, the right ones first.
        num_right: how many candidates are right.
    """
    # MMEB-eval has the texts and the images of the candidates in two lists.
    texts, images = zip(*candidates, strict=True)
    return {"qry_text": query, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": images, "right": num_right}


def _text_record(query: str, image: str, right: str, wrong: Iterable[str]) -> Row:
    """Make a record whose candidates are texts."""
    return _record(query, image, [(text, "") for text in (right, *wrong)])


def _classification(
    folder: str, instruction: str, wrong_column: str | None = None, max_rows: int | None = None
) -> VideoRowFormat:
    """Find a video's class: among those of all rows, or those that a further column lists.

    Args:
        folder: of the videos' frames.
        instruction: the query's text.
        wrong_column: the column that lists other classes, if there is one.
        max_rows: how many rows are used; all if None.
    """
    columns = ["video_id", "pos_text"]
    if wrong_column:
        columns.append(wrong_column)
    to_record = partial(_class_record, folder=folder, instruction=instruction, wrong_column=wrong_column)
    return VideoRowFormat(tuple(columns), to_record, max_rows)


def _class_record(row: Row, list_clips: ListClips, folder: str, instruction: str, wrong_column: str | None) -> Row:
    """Make a record whose right candidate is the video's class."""
    # Without a column of wrong classes, `read_records` adds the classes of the other rows.
    wrong = row[wrong_column] if wrong_column else []
    return _text_record(instruction, f"{folder}/{row['video_id']}", row["pos_text"], wrong)


def _video_retrieval(folder: str, instruction: str, video_column: str, caption_column: str) -> VideoRowFormat:
    """Find the video of a caption, the first of several, among those of all rows.

    Args:
        folder: of the videos' frames.
        instruction: comes before the caption.
        video_column: names the video.
        caption_column: holds a caption or several.
    """
    columns = (video_column, caption_column)
    return VideoRowFormat(columns, partial(_video_record, folder=folder, instruction=instruction, columns=columns))


def _video_record(row: Row, list_clips: ListClips, folder: str, instruction: str, columns: tuple[str, str]) -> Row:
    """Make a record whose candidate is the caption's video."""
    video, captions = (row[column] for column in columns)
    caption = captions if isinstance(captions, str) else captions[0]
    return _record(f"{instruction} {caption}", "", [(WATCH, f"{folder}/{_stem(video)}")])


def _question_answering(
    frames: str, columns: Sequence[str], parse: Callable[[Row], tuple[str, list[str], int]]
) -> VideoRowFormat:
    """Find the answer to a question about a video among the options.

    Args:
        frames: the folder of its frames, a template of the row's columns.
        columns: of the row.
        parse: gives the question, the options, and the number of the right one.
    """
    return VideoRowFormat(tuple(columns), partial(_answer_record, frames=frames, parse=parse))


def _answer_record(
    row: Row, list_clips: ListClips, frames: str, parse: Callable[[Row], tuple[str, list[str], int]]
) -> Row:
    """Make a record whose candidates are the options of a question."""
    question, options, right = parse(row)
    # By number, since two options may have the same text.
    wrong = [option for number, option in enumerate(options) if number != right]
    return _text_record(f"{CHOOSE} {question}", frames.format(**row), options[right], wrong)


def _moment_retrieval(folder: str) -> VideoRowFormat:
    """Find the clip of a video that a sentence describes, among the clips in the video's folder."""
    return VideoRowFormat(("query", "video_path"), partial(_moment_record, folder=folder))


def _moment_record(row: Row, list_clips: ListClips, folder: str) -> Row:
    """Make a record whose candidates are the clips of a video."""
    frames = f"{folder}/{_stem(row['video_path'])}"
    # The folder "query" holds the video itself; the right clip comes first, as in MMEB-eval.
    clips = sorted(set(list_clips(frames)) - {"query"})
    clips.sort(key=lambda clip: not clip.startswith("positive"))
    if not clips or not clips[0].startswith("positive"):
        raise CafeError(
            f"The frames in {shorten(escape_controls(frames))} have no folder of the clip that is right (positive...)."
        )
    candidates = [(WATCH, f"{frames}/{clip}") for clip in clips]
    return _record(f"{FIND_MOMENT} {row['query']}", f"{frames}/query", candidates)


def _moment_seeker(folder: str) -> VideoRowFormat:
    """Find a clip by words, alone or with an image or a video; several may be right."""
    columns = ("query", "input_frames", "positive_frames", "negative_frames")
    return VideoRowFormat(columns, partial(_moment_seeker_record, folder=folder))


def _moment_seeker_record(row: Row, list_clips: ListClips, folder: str) -> Row:
    """Make a record whose candidates are clips of any videos, the right ones first."""
    shown = row["input_frames"] or ""  # what comes with the words: an image's name, a video's, or nothing
    suffix = Path(shown).suffix
    match suffix:
        case ".jpg":
            image = f"{folder}/query_{shown}"
        case ".mp4":
            image = _moment_seeker_frames(shown, folder)
        case _:
            suffix, image = "", ""
    # MMEB-eval has the right candidates first.
    clips = [*row["positive_frames"], *row["negative_frames"]]
    candidates = [(WATCH_CLIP, _moment_seeker_frames(clip["output_path"], folder)) for clip in clips]
    return _record(f"{SEEK_MOMENT[suffix]} {row['query']}", image, candidates, len(row["positive_frames"]))


def _moment_seeker_frames(video: str, folder: str) -> str:
    """Name a video's folder of frames: "movie/a.mp4" has its frames in "movie_a"."""
    name = video.partition(".mp4")[0]
    return f"{folder}/video_frames/{name.replace('/', '_')}"


def _stem(video: Any) -> str:
    """Name a video's folder of frames; its column may hold a path, a file's name or a number."""
    return Path(str(video)).stem


def _strip_letters(options: Sequence[str]) -> list[str]:
    """Remove the letters of options: "A. a dog." becomes "a dog"."""
    # Every option must have its letter: for another, `find` gives -1.
    return [option[option.find(". ") :].strip(". ") for option in options]


def _add_letters(options: Sequence[str]) -> list[str]:
    """Put letters before options: "a dog" becomes "(A) a dog"."""
    return [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]


def _with_options(question: str, options: Sequence[str]) -> str:
    """Append lettered options to a question, a line for each."""
    return "\n".join([question, "Options:", *_add_letters(options)])


# Each dataset of questions has its own columns for the question, the options and the answer. Line breaks and spaces are
# those of VLM2Vec's prompts.


def _video_mme(row: Row) -> tuple[str, list[str], int]:
    """Parse a row of Video-MME, whose answer is the option's letter."""
    question = "\n".join([row["question"], *row["options"]])
    return question, _strip_letters(row["options"]), "ABCD".index(row["answer"])


def _next_qa(row: Row) -> tuple[str, list[str], int]:
    """Parse a row of NExT-QA, whose options are columns and whose answer is a number."""
    options = [row[f"a{number}"] for number in range(5)]
    return _with_options(row["question"], options), options, int(row["answer"])


def _ego_schema(row: Row) -> tuple[str, list[str], int]:
    """Parse a row of EgoSchema, whose options have letters and whose answer is a number."""
    # No space after the question, as in VLM2Vec.
    question = row["question"] + " ".join(row["option"])
    return question, _strip_letters(row["option"]), int(row["answer"])


def _mv_bench(row: Row) -> tuple[str, list[str], int]:
    """Parse a row of MVBench, whose answer is the option's text."""
    # The candidates have the letters of the question.
    right = list(row["candidates"]).index(row["answer"])
    return _with_options(row["question"], row["candidates"]), _add_letters(row["candidates"]), right


def _activity_net(row: Row) -> tuple[str, list[str], int]:
    """Parse a row of ActivityNet-QA, whose questions are answered by yes or no."""
    options = ["yes", "no"]
    return row["question"] + "? (A) yes; (B) no.", options, options.index(row["answer"])


# VLM2Vec's prompts, with its grammar and trailing spaces: the numbers depend on them.
VIDEO_FORMATS = {
    "K700": _classification("video_cls/K700", "Recognize the category of the video content."),
    "SmthSmthV2": _classification(
        "video_cls/SSv2",
        "What actions or object interactions are being performed by the person in the video?",
        "neg_text",  # it holds the right one too
        max_rows=1000,
    ),
    "HMDB51": _classification(
        "video_cls/HMDB51", "What actions or objects interactions are the person in the video doing?"
    ),
    "UCF101": _classification(
        "video_cls/UCF101", "What activities or sports are being performed by the person in the video?"
    ),
    "Breakfast": _classification(
        "video_cls/Breakfast", "Recognize the breakfast type that the person is cooking in the video. "
    ),
    "DiDeMo": _video_retrieval(
        "video_ret/DiDeMo", "Find a video that includes the following described scenes:", "video", "caption"
    ),
    "MSR-VTT": _video_retrieval(
        "video_ret/MSR-VTT", "Find a video that contains the following visual content:", "video_id", "caption"
    ),
    "MSVD": _video_retrieval(
        "video_ret/MSVD", "Find the video snippet that corresponds to the given summary:", "video_id", "caption"
    ),
    "VATEX": _video_retrieval(
        "video_ret/VATEX", "Select a video that fits the description provided:", "videoID", "enCap"
    ),
    "YouCook2": _video_retrieval(
        "video_ret/YouCook2",
        "Find a video that demonstrates the following action while making a recipe:",
        "id",
        "sentence",
    ),
    "QVHighlight": _moment_retrieval("video_mret/QVHighlight"),
    "Charades-STA": _moment_retrieval("video_mret/Charades_STA"),
    "MomentSeeker": _moment_seeker("video_mret/MomentSeeker"),
    "Video-MME": _question_answering(
        "video_qa/Video-MME/{videoID}", ("videoID", "question", "options", "answer"), _video_mme
    ),
    "NExTQA": _question_answering(
        "video_qa/NExTQA/{video}", ("video", "question", "answer", "a0", "a1", "a2", "a3", "a4"), _next_qa
    ),
    "EgoSchema": _question_answering(
        "video_qa/EgoSchema/{video_idx}", ("video_idx", "question", "option", "answer"), _ego_schema
    ),
    "MVBench": _question_answering(
        "video_qa/MVBench/{subset}/{video}", ("subset", "video", "question", "candidates", "answer"), _mv_bench
    ),
    "ActivityNetQA": _question_answering(
        "video_qa/ActivityNetQA/v_{video_name}", ("video_name", "question", "answer"), _activity_net
    ),
}
"""The 18 datasets, by the names that files and the leaderboard use."""


def to_records(name: str, rows: Sequence[Row], data: Path, source: Path, folders: Sequence[str]) -> list[Row]:
    """Turn the rows of a Hub dataset into records of MMEB-eval.

    Args:
        name: the dataset's.
        rows: its rows.
        data: the folder of evaluation files.
        source: the file of the rows.
        folders: where frames may be, under `data`.

    Raises:
        CafeError: a row does not have the dataset's format, or there are no clips.
    """
    row_format = VIDEO_FORMATS[name]
    list_clips = partial(_list_clips, data=data, source=source, folders=folders)
    records = []
    for number, row in enumerate(rows[: row_format.max_rows]):
        # The formats read columns without checking them: whatever they raise means a wrong row.
        try:
            records.append(row_format.to_record(row, list_clips))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CafeError(f"Record {number} of {source} is not a row of {name}: {error!r:.200}.") from None
    return records


def _list_clips(frames: str, data: Path, source: Path, folders: Sequence[str]) -> list[str]:
    """List the names of the folders in a folder of frames, which is under one of some folders of `data`."""
    path = find_in_folders(data, folders, frames)
    if path is None or not path.is_dir():
        places = list_folders(data, folders)
        raise CafeError(
            f"The folder of frames {shorten(escape_controls(frames))}, which {source} names, is in none of {places}."
        )
    return [clip.name for clip in path.iterdir() if clip.is_dir()]
