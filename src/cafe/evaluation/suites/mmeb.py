"""MMEB: 36 datasets of pictures, 18 of videos (as frames) and 24 of visual documents, each a query among candidates.

V1 (arXiv 2410.05160) gives each query its own candidates, of which the first is right, and counts Precision@1. V2
(arXiv 2507.04590) adds videos, scored alike, of which some datasets rank all their candidates for every query; and
documents, where a query looks for pages in a whole corpus with graded relevance, scored by NDCG@5. The table of
datasets and the prompts of documents are those of VLM2Vec's code (github.com/TIGER-AI-Lab/VLM2Vec,
experiments/report_score_v2.py and src/data/eval_dataset).

Contents are embedded in multimodal mode: the record's text and pictures are the user's turn, nothing is added. A mean
over datasets weighs each dataset alike, as the leaderboard does. Ties count against the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from cafe.content import Content, ImageRef
from cafe.data.formats.mmeb import MARK
from cafe.data.image_fields import list_frames, place_images
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.metrics import ndcg_at_k, rank_of_match
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, evenly_spaced, json_lines, mean_of, parquet_rows
from cafe.evaluation.suites import mmeb_video

FRAMES = 8  # of a video, evenly spread, as VLM2Vec takes them
KS = (1, 5, 10)
PAGE_QUERY = "Find a document image that matches the given query: "
PAGE = "Understand the content of the provided document image."
FOLDERS = ("", "images", "mmeb_eval", "mmeb_eval/images", "image-tasks", "video-tasks/frames")  # of pictures

Modality = Literal["image", "video", "visdoc"]


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset by its name.

    Attributes:
        modality: which part of the leaderboard it belongs to.
        task: its meta-task.
        trained: whether MMEB-train holds its training split (in distribution); None where V1's grouping has no say.
        whole: every query ranks all candidates of the dataset, not its own alone.
    """

    modality: Modality
    task: str
    trained: bool | None = None
    whole: bool = False


def _named(names: str, modality: Modality, task: str, trained: bool | None = None, whole: bool = False) -> Any:
    return {name: Dataset(modality, task, trained, whole) for name in names.split()}


DATASETS: dict[str, Dataset] = {
    **_named("ImageNet-1K N24News HatefulMemes VOC2007 SUN397", "image", "classification", True),
    **_named("Place365 ImageNet-A ImageNet-R ObjectNet Country211", "image", "classification", False),
    **_named("OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "image", "vqa", True),
    **_named("ScienceQA VizWiz GQA TextVQA", "image", "vqa", False),
    **_named(
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA", "image", "retrieval", True
    ),
    **_named("FashionIQ Wiki-SS-NQ OVEN EDIS", "image", "retrieval", False),
    **_named("MSCOCO", "image", "grounding", True),
    **_named("RefCOCO RefCOCO-Matching Visual7W-Pointing", "image", "grounding", False),
    **_named("SmthSmthV2", "video", "video_classification"),
    **_named("K700 HMDB51 UCF101 Breakfast", "video", "video_classification", whole=True),
    **_named("MVBench Video-MME NExTQA EgoSchema ActivityNetQA", "video", "video_qa"),
    **_named("DiDeMo MSR-VTT MSVD VATEX YouCook2", "video", "video_retrieval", whole=True),
    **_named("QVHighlight Charades-STA MomentSeeker", "video", "moment_retrieval"),
    **_named(
        "ViDoRe_arxivqa ViDoRe_docvqa ViDoRe_infovqa ViDoRe_tabfquad ViDoRe_tatdqa ViDoRe_shiftproject "
        "ViDoRe_syntheticDocQA_artificial_intelligence ViDoRe_syntheticDocQA_energy "
        "ViDoRe_syntheticDocQA_government_reports ViDoRe_syntheticDocQA_healthcare_industry",
        "visdoc",
        "vidore_v1",
    ),
    **_named(
        "ViDoRe_esg_reports_human_labeled_v2 ViDoRe_biomedical_lectures_v2_multilingual "
        "ViDoRe_economics_reports_v2_multilingual ViDoRe_esg_reports_v2_multilingual",
        "visdoc",
        "vidore_v2",
    ),
    **_named(
        "VisRAG_ArxivQA VisRAG_ChartQA VisRAG_MP-DocVQA VisRAG_SlideVQA VisRAG_InfoVQA VisRAG_PlotQA",
        "visdoc",
        "visrag",
    ),
    **_named("ViDoSeek-page ViDoSeek-doc MMLongBench-page MMLongBench-doc", "visdoc", "visdoc_ood"),
}
"""The 36 + 18 + 24 datasets by the names that files and the leaderboard have."""


@dataclass(frozen=True)
class Side:
    """A query or a candidate: its text, and its pictures by name (a folder holds frames) or encoded."""

    text: str
    pictures: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class Question:
    """A query, its candidates, and by number the gain of each right one."""

    query: Side
    candidates: Sequence[Side]
    gains: dict[int, float] = field(default_factory=lambda: {0: 1.0})
    id: str | int = 0


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Measures every dataset that is there, the first `limit` queries of each."""
    model = model.with_prompts(mode="multimodal")
    done = EvaluationResult()
    scores: dict[str, dict[str, float]] = {}
    for name, path in datasets(data).items():
        known = dataset(name, path)
        questions = (
            read_corpus(path, limit)
            if known.modality == "visdoc"
            else read_records(path, limit, known.whole, name if known.modality == "video" else "", data)
        )
        found = embed(model, data, path, questions)
        rows: list[dict[str, Any]] = []
        for question, similarity in zip(questions, found, strict=True):
            at = score(similarity, question.gains)
            metric, value = ("NDCG@5", at["ndcg_linear@5"]) if known.modality == "visdoc" else ("P@1", at["hit@1"])
            best = question.candidates[int(np.argmax(similarity))]
            said = {"asked": question.query.text, "said": best.text, **_display_text(best), "right": at["hit@1"] == 1}
            rows.append({"id": question.id, **said, "scores": at, "marks": {f"mmeb/{name}/{metric}": value}})
        done.outputs[f"mmeb/{name}"] = rows
        done.results |= aggregate(rows)
        scores[name] = {at: float(np.mean([row["scores"][at] for row in rows])) for at in rows[0]["scores"]}
        scores[name] |= {"num_pred": len(rows), "num_data": len(rows)}
    measured = list(done.results)
    for group, of in means(measured).items():
        mean_of(done, group, of)
    done.results["mmeb/overall/datasets"] = len(measured)
    done.files = score_files(scores, describe(model.model))
    return done


def dataset(name: str, path: Path) -> Dataset:
    """What is known of a dataset; one of another name is a task by itself, of pages where it has a corpus."""
    return DATASETS.get(name, Dataset("visdoc" if path.is_dir() and _corpus(path) else "image", name))


def score(similarity: Float[np.ndarray, " candidates"], gains: dict[int, float]) -> dict[str, float]:
    """hit@k (a right candidate is among the first k) and ndcg_linear@k of one query, from 0 to 1."""
    gain = np.zeros(len(similarity))
    gain[list(gains)] = list(gains.values())
    [rank] = rank_of_match(similarity[None], gain[None] > 0)
    return {
        **{f"hit@{k}": float(rank < k) for k in KS},
        **{f"ndcg_linear@{k}": float(ndcg_at_k(similarity[None], gain[None], k)[0]) for k in KS},
    }


def embed(
    model: CachedModel, data: Path, source: Path, questions: Sequence[Question]
) -> list[Float[np.ndarray, " candidates"]]:
    """The similarity of each query with its candidates. Equal contents are embedded once."""
    numbers: dict[Side, int] = {}
    places: dict[int, Int[np.ndarray, " candidates"]] = {}  # by identity: questions may share their candidates
    for question in questions:
        numbers.setdefault(question.query, len(numbers))
        if id(question.candidates) not in places:
            at = [numbers.setdefault(candidate, len(numbers)) for candidate in question.candidates]
            places[id(question.candidates)] = np.array(at)
    vectors = model.embed([content(side, data, source) for side in numbers])
    return [vectors[places[id(one.candidates)]] @ vectors[numbers[one.query]] for one in questions]


def content(side: Side, data: Path, source: Path) -> Content:
    """A side as the user's turn: each picture at its mark, those without one first. No picture, no mark.

    Raises:
        CafeError: a picture is not there, or there are more marks than pictures.
    """
    if not side.pictures:
        return Content.of(MARK.sub("", side.text).strip())
    refs = [ref for picture in side.pictures for ref in _refs(picture, data, source)]
    marks = len(MARK.findall(side.text))
    if marks and len(refs) != marks:  # a video's one mark stands for all its frames
        return Content((*refs, *Content.of(MARK.sub("", side.text).strip()).parts))
    return place_images(side.text, list(refs), MARK)


def _refs(picture: str | bytes, data: Path, source: Path) -> list[ImageRef]:
    if isinstance(picture, bytes):
        return [ImageRef(picture)]
    path = next((data / folder / picture for folder in FOLDERS if (data / folder / picture).exists()), None)
    if path is None:
        places = ", ".join(str(data / folder) for folder in FOLDERS)
        raise CafeError(f"The picture {picture}, which {source} names, is in none of {places}.")
    frames = [ImageRef(path)] if path.is_file() else list_frames(str(path))
    return [frames[at] for at in evenly_spaced(len(frames), FRAMES)]


def _display_text(side: Side) -> dict[str, str]:
    names = [picture for picture in side.pictures if isinstance(picture, str)]
    return {"image": names[0]} if names else {}


def means(results: Sequence[str]) -> dict[str, list[str]]:
    """Which results each mean is of: each meta-task, V1 in and out of distribution, each modality, and all.

    Args:
        results: the names `mmeb/DATASET/METRIC` of what was measured. A mean is over those of them it is about.
    """
    groups: dict[str, list[str]] = {}
    for result in results:
        _, name, metric = result.split("/")
        known = DATASETS.get(name)
        about = ["overall"]
        if known:
            about += [known.task, known.modality]
            about += [] if known.trained is None else ["IND" if known.trained else "OOD"]
        for group in about:
            groups.setdefault(f"mmeb/{group}/{'mean' if group == 'overall' else metric}", []).append(result)
    return groups


def score_files(scores: dict[str, dict[str, float]], metadata: dict[str, Any]) -> dict[str, Any]:
    """The files that VLM2Vec's code and the leaderboard know, by name.

    `mmeb/NAME_score.json` of each dataset with one right candidate is V1's: `acc`, `num_correct`, `num_pred`.
    `mmeb/leaderboard.json` is V2's: the metadata, and the metrics of every dataset by modality.
    """
    files: dict[str, Any] = {}
    metrics: dict[str, dict[str, Any]] = {}
    for name, known in DATASETS.items():
        # The pages of these two were repaired, and the leaderboard has them under another name.
        shown = f"{name}-fixed" if name in ("ViDoSeek-page", "MMLongBench-page") else name
        metrics.setdefault(known.modality, {})[shown] = scores.get(name, "FILE_N/A")
    for name, values in scores.items():
        if name not in DATASETS or DATASETS[name].modality != "visdoc":
            right = round(values["hit@1"] * values["num_pred"])
            counts = {"acc": values["hit@1"], "num_correct": right, "num_pred": values["num_pred"]}
            files[f"mmeb/{name}_score.json"] = counts
    return files | {"mmeb/leaderboard.json": {"metadata": metadata, "metrics": metrics}}


def describe(model: Any) -> dict[str, Any]:
    """The leaderboard's metadata of a model, as far as the model knows it; the rest is the submitter's to fill in."""
    lvlm = getattr(model, "lvlm", None)
    parameters = sum(parameter.numel() for parameter in lvlm.parameters()) if lvlm else None
    return {
        "model_name": Path(lvlm.name_or_path).name if lvlm else None,
        "model_backbone": lvlm.config.model_type if lvlm else None,
        "model_size": f"{parameters / 1e9:.2g}B parameters" if parameters else None,
        "embedding_dimension": lvlm.config.get_text_config().hidden_size if lvlm else None,
        "max_length_tokens": getattr(lvlm.config.get_text_config(), "max_position_embeddings", None) if lvlm else None,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
    }


def datasets(data: Path) -> dict[str, Path]:
    """The datasets under a folder: a file of records, or a folder with such a file or with a corpus.

    Raises:
        CafeError: one of them is there twice.
    """
    found: dict[str, Path] = {}
    root = data / "mmeb_eval"
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.suffix in (".parquet", ".jsonl"):
            name = path.stem
        elif path.is_dir() and (_corpus(path) or _parts(path)):
            name = path.name
        else:
            continue
        if name in found:
            raise CafeError(f"{found[name].name} and {path.name} in {root} measure the same: keep one of them.")
        found[name] = path
    return dict(sorted(found.items(), key=lambda item: list(DATASETS).index(item[0]) if item[0] in DATASETS else -1))


def _corpus(path: Path) -> bool:
    return all((path / part).is_dir() for part in ("queries", "corpus", "qrels"))


def _parts(path: Path) -> list[Path]:
    """The parquet files of a folder, or the file itself."""
    return sorted(path.glob("test*.parquet")) or sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def read_records(
    path: Path, limit: int | None = None, whole: bool = False, video: str = "", data: Path = Path()
) -> list[Question]:
    """Rows of MMEB-eval: `qry_text`, `qry_img_path`, and the lists `tgt_text` and `tgt_img_path`, the right one first.

    Where `qry_inst` and `tgt_inst` stand beside, they come before the query's text, and before a candidate's text where
    it has a picture. A picture's field may be a list, or a folder of a video's frames. A candidate that is there twice
    counts once.

    Args:
        path: parquet or JSON lines.
        limit: the first rows.
        whole: every query ranks the candidates of all these rows, and those named in `NAME_labels.txt` beside.
        video: the name of a dataset of videos, whose rows may have the Hub's own columns.
        data: the folder of evaluation files, where frames lie.

    Raises:
        CafeError: a row lacks a field, has no candidate, or lists of different lengths.
    """
    rows = _rows(path, video, data, limit)
    questions = []
    for number, row in enumerate(rows):
        texts = row["tgt_text"] if isinstance(row["tgt_text"], (list, tuple)) else []
        pictures = row["tgt_img_path"] or [""] * len(texts)
        if not texts or len(texts) != len(pictures):
            raise CafeError(
                f"Record {number} of {path} has {len(texts)} texts and {len(pictures)} pictures of candidates."
            )
        sides = [
            _side(text, names, row.get("tgt_inst") if names else "")
            for text, names in zip(texts, pictures, strict=True)
        ]
        query = _side(row["qry_text"], row["qry_img_path"], row.get("qry_inst"))
        right = dict.fromkeys(sides[: row.get("right", 1)])
        questions.append(Question(query, list(dict.fromkeys(sides)), dict.fromkeys(range(len(right)), 1.0), number))
    if not whole:
        return questions
    labels = path.with_name(f"{video or path.stem}_labels.txt")
    named = labels.read_text().splitlines() if labels.is_file() else []
    candidates = [side for question in questions for side in question.candidates]
    every = list(dict.fromkeys([*candidates, *(Side(name.strip()) for name in named if name.strip())]))
    at = {side: place for place, side in enumerate(every)}
    return [Question(one.query, every, {at[one.candidates[0]]: 1.0}, one.id) for one in questions]


def _rows(path: Path, video: str, data: Path, limit: int | None) -> list[dict[str, Any]]:
    """The first rows of a file or folder, in MMEB-eval's fields."""

    def rows(fields: Sequence[str], most: int | None) -> list[dict[str, Any]]:
        lines = path.suffix == ".jsonl"
        found = (
            json_lines(path, dict.fromkeys(fields, object)) if lines else parquet_rows(_parts(path), path, fields, most)
        )
        return found[:most]

    form = mmeb_video.FORMATS.get(video)
    if form and "qry_text" not in rows((), 1)[0]:
        return mmeb_video.records(video, rows(form.columns, limit), data, path, FOLDERS)
    return rows(("qry_text", "qry_img_path", "tgt_text", "tgt_img_path"), limit)


def _side(text: str | None, pictures: str | Sequence[str] | None, instruction: str | None = "") -> Side:
    names = [pictures] if isinstance(pictures, str) else list(pictures or [])
    words = [part.strip(" ") for part in (instruction, text) if part and part.strip()]
    return Side(" ".join(words), tuple(name for name in names if name))


def read_corpus(path: Path, limit: int | None = None) -> list[Question]:
    """Queries that look for pages in a corpus: the folders `queries`, `corpus` and `qrels` of parquet files.

    Raises:
        CafeError: a column is missing, or a query has no relevant page in the corpus.
    """

    def rows(part: str, *columns: str) -> list[dict[str, Any]]:
        return parquet_rows(_parts(path / part), path / part, columns)

    pages = rows("corpus", "corpus-id", "image")
    number = {row["corpus-id"]: at for at, row in enumerate(pages)}
    every = [Side(PAGE, (_encoded(row["image"], path),)) for row in pages]
    relevant: dict[Any, dict[int, float]] = {}
    for row in rows("qrels", "query-id", "corpus-id", "score"):
        if row["score"] > 0 and row["corpus-id"] in number:
            gains, at = relevant.setdefault(row["query-id"], {}), number[row["corpus-id"]]
            gains[at] = max(gains.get(at, 0.0), float(row["score"]))
    asked = rows("queries", "query-id", "query")[:limit]
    lost = next((row["query-id"] for row in asked if row["query-id"] not in relevant), None)
    if lost is not None:
        raise CafeError(f"The query {lost} of {path} has no relevant page in its corpus.")
    return [
        Question(Side(PAGE_QUERY + row["query"]), every, relevant[row["query-id"]], row["query-id"]) for row in asked
    ]


def _encoded(image: Any, path: Path) -> str | bytes:
    """A page's picture as the datasets library keeps it, or its name."""
    picture = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    if not isinstance(picture, (str, bytes)) or not picture:
        raise CafeError(f"A page of the corpus of {path} has no picture.")
    return picture


MMEB = Suite(
    name="mmeb",
    measures="queries of text, picture or both find their match: 36 datasets, and V2's videos and documents",
    files=(
        "mmeb_eval/NAME.parquet, .jsonl, or mmeb_eval/NAME/test*.parquet: a dataset's records",
        "mmeb_eval/NAME/{queries,corpus,qrels}/*.parquet: a visual-document dataset of V2",
        "mmeb_eval/NAME.parquet or .jsonl: a video dataset of V2, in the columns of its Hub dataset VLM2Vec/NAME",
        "their pictures and folders of frames, in the folder itself or in " + ", ".join(FOLDERS[1:]),
    ),
    download="the Hub datasets TIGER-Lab/MMEB-eval (V1), ziyjiang/MMEB_Test_Instruct and TIGER-Lab/MMEB-V2; "
    "written small by `cafe scenes write DIR`",
    sources=("arXiv 2410.05160", "arXiv 2507.04590"),
    find_files=lambda data: list(datasets(data).values()),
    run=run,
    default=False,
)
