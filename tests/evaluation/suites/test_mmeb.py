"""MMEB's files as queries, the embedding of each content once, and the results, on small files and on the scenes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cafe import Cafe
from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.runner import evaluate, write
from cafe.evaluation.suites.mmeb import run
from cafe.evaluation.suites.mmeb.datasets import find_datasets
from cafe.evaluation.suites.mmeb.readers import PAGE, PAGE_QUERY, Side, read_corpus, read_records, to_content


class ByName:
    """Embeds by what `look` makes of a content's text and its images' names; counts what it is given."""

    def __init__(self, look) -> None:
        self.look = look
        self.seen: list[Content] = []
        self.modes: list[str] = []

    def with_prompts(self, mode):
        self.modes.append(mode)
        return self

    def embed(self, contents, batch_size=32):
        self.seen += contents
        rows = np.array([self.look(content) for content in contents], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


COLORS = ("red", "green", "blue")


def by_color(content: Content) -> list[float]:
    named = content.text + " ".join(str(ref) for ref in content.images)
    return [float(color in named) for color in COLORS]


def collapsed(content: Content) -> list[float]:
    return [1.0, 2.0, 3.0]


def table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    for color in COLORS:
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / f"{color}.png")
    return tmp_path


def color_rows(wrong: int = 2) -> list[dict]:
    """An image looks for its color's name among others'."""
    rows = []
    for color in COLORS:
        names = [color, *(other for other in COLORS if other != color)][: wrong + 1]
        query = {"qry_text": "<|image_1|>\nWhich color?", "qry_img_path": f"{color}.png"}
        rows.append({**query, "tgt_text": names, "tgt_img_path": [""] * len(names)})
    return rows


def test_the_first_candidate_is_right_and_equal_contents_are_embedded_once(data):
    table(data / "mmeb_eval" / "SUN397.parquet", color_rows())
    model = ByName(by_color)
    done = run(CachedModel(model), data, None)
    assert done.results["mmeb/SUN397/P@1"] == done.results["mmeb/IND/P@1"] == 100
    assert done.results["mmeb/overall/datasets"] == 1 and done.means["mmeb/IND/P@1"] == ["mmeb/SUN397/P@1"]
    assert model.modes == ["multimodal"]
    assert len(model.seen) == 3 + 3  # three images, three names, though each row has all names
    assert model.seen[0].parts[1] == "Which color?" and isinstance(model.seen[0].parts[0], ImageRef)
    assert [row["said"] for row in done.outputs["mmeb/SUN397"]] == list(COLORS)


def test_a_collapsed_model_finds_nothing(data):
    table(data / "mmeb_eval" / "SUN397.parquet", color_rows())
    done = run(CachedModel(ByName(collapsed)), data, None)
    assert done.results["mmeb/SUN397/P@1"] == 0


def test_score_files_are_those_of_vlm2vec_and_the_leaderboard(data, tmp_path):
    rows = color_rows()
    rows[0]["tgt_text"] = rows[0]["tgt_text"][::-1]  # the first is wrong
    table(data / "mmeb_eval" / "SUN397" / "test-00000-of-00001.parquet", rows)
    done = evaluate(ByName(by_color), data, suites=["mmeb"], report=lambda line: None)
    write(done, tmp_path / "out")
    v1 = json.loads((tmp_path / "out" / "mmeb" / "SUN397_score.json").read_text())
    assert v1 == {"acc": pytest.approx(2 / 3), "num_correct": 2, "num_pred": 3}
    board = json.loads((tmp_path / "out" / "mmeb" / "leaderboard.json").read_text())
    assert set(board) == {"metadata", "metrics"}
    assert list(board["metrics"]) == ["image", "video", "visdoc"]
    assert [len(sets) for sets in board["metrics"].values()] == [36, 18, 24]
    assert board["metrics"]["image"]["SUN397"]["hit@1"] == pytest.approx(2 / 3)
    assert board["metrics"]["image"]["SUN397"]["num_data"] == 3
    assert board["metrics"]["image"]["GQA"] == "FILE_N/A"
    assert {"MMLongBench-page-fixed", "ViDoSeek-page-fixed"} < set(board["metrics"]["visdoc"])
    assert "data_source" in board["metadata"]


def test_the_instruction_variant_puts_instructions_before_queries_and_images(data):
    rows = [
        {
            "qry_inst": "Find an image of the color: ",
            "qry_text": "red",
            "qry_img_path": "",
            "tgt_inst": "<|image_1|>\nRepresent it.",
            "tgt_text": ["", " dark"],
            "tgt_img_path": ["red.png", "blue.png"],
        },
        {
            "qry_inst": "<|image_1|>\nName it.",
            "qry_text": "",
            "qry_img_path": "red.png",
            "tgt_inst": "unused",
            "tgt_text": ["red", "blue"],
            "tgt_img_path": ["", ""],
        },
    ]
    queries = read_records(table(data / "mmeb_eval" / "mine.parquet", rows))
    assert queries[0].side == Side("Find an image of the color: red")
    assert queries[0].candidates == [
        Side("<|image_1|>\nRepresent it.", ("red.png",)),
        Side("<|image_1|>\nRepresent it. dark", ("blue.png",)),
    ]
    assert queries[1].side == Side("<|image_1|>\nName it.", ("red.png",))
    assert queries[1].candidates == [Side("red"), Side("blue")]


def test_a_candidate_that_is_there_twice_counts_once(data):
    row = {"qry_text": "red", "qry_img_path": "", "tgt_text": ["red", "blue", "red"], "tgt_img_path": ["", "", ""]}
    (query,) = read_records(table(data / "mmeb_eval" / "mine.parquet", [row]))
    assert query.candidates == [Side("red"), Side("blue")]


def test_videos_are_folders_of_frames_and_some_rank_all_candidates(data):
    for color in COLORS:
        folder = data / "mmeb_eval" / "images" / f"{color}-clip"
        folder.mkdir(parents=True)
        for number in range(30):
            Image.new("RGB", (8, 8), color).save(folder / f"frame_{number:04}.jpg")
    rows = [
        {"qry_text": f"Find: {color}", "qry_img_path": "", "tgt_text": ["<|image_1|>\n"], "tgt_img_path": [name]}
        for color in COLORS
        for name in [f"{color}-clip"]
    ]
    lines = data / "mmeb_eval" / "MSVD.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(CachedModel(ByName(by_color)), data, None)
    assert done.results["mmeb/MSVD/P@1"] == done.results["mmeb/video_retrieval/P@1"] == 100
    assert (
        run(CachedModel(ByName(collapsed)), data, None).results["mmeb/MSVD/P@1"] == 0
    )  # of three, though a row has one
    shown = to_content(read_records(lines)[0].candidates[0], data, lines)
    numbers = [int(str(ref)[-8:-4]) for ref in shown.images]
    assert numbers == np.linspace(0, 29, 8, dtype=int).tolist() and shown.text == ""
    listed = Side("two images", ("red.png", "blue.png"))
    assert [Path(str(ref)).name for ref in to_content(listed, data, lines).images] == ["red.png", "blue.png"]


def test_frames_are_in_the_order_of_their_numbers_as_in_training(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in (0, 11, 2, 1):
        (tmp_path / "clip" / f"{number}.bmp").touch()
    shown = to_content(Side("", ("clip",)), tmp_path, tmp_path / "MSVD.jsonl")
    assert [Path(str(ref)).stem for ref in shown.images] == ["0", "1", "2", "11"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CafeError, match="empty holds no images"):
        to_content(Side("", ("empty",)), tmp_path, tmp_path / "MSVD.jsonl")


def write_corpus(folder: Path, judged: list[dict]) -> None:
    pages = []
    for color in COLORS:
        buffer = folder / f"{color}.png"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(buffer)
        pages.append({"corpus-id": color, "image": {"bytes": buffer.read_bytes(), "path": f"{color}.png"}})
        buffer.unlink()
    table(folder / "corpus" / "test-00000-of-00002.parquet", pages[:2])
    table(folder / "corpus" / "test-00001-of-00002.parquet", pages[2:])
    asked = [{"query-id": number, "query": color} for number, color in enumerate(COLORS)]
    table(folder / "queries" / "test-00000-of-00001.parquet", asked)
    table(folder / "qrels" / "test-00000-of-00001.parquet", judged)


def mean_color(content: Content) -> list[float]:
    if not content.images:
        return by_color(content)
    from cafe.images.decoding import decode_image

    return np.asarray(decode_image(content.images[0]), float).mean(axis=(0, 1)).tolist()


def test_documents_rank_the_whole_corpus_by_graded_relevance(data):
    judged = [{"query-id": number, "corpus-id": color, "score": 1} for number, color in enumerate(COLORS)]
    judged += [{"query-id": 0, "corpus-id": "blue", "score": 2}, {"query-id": 1, "corpus-id": "red", "score": 0}]
    write_corpus(data / "mmeb_eval" / "VisRAG_PlotQA", judged)
    model = ByName(mean_color)
    done = run(CachedModel(model), data, None)
    # The first query finds red (gain 1) and then, tied with green, blue (gain 2) last; the best order is blue, red.
    first = (1 + 2 / np.log2(4)) / (2 + 1 / np.log2(3))
    assert done.results["mmeb/VisRAG_PlotQA/NDCG@5"] == pytest.approx(100 * (first + 1 + 1) / 3, abs=1e-4)
    assert done.results["mmeb/visrag/NDCG@5"] == done.results["mmeb/VisRAG_PlotQA/NDCG@5"]
    assert model.seen[0].text == PAGE_QUERY + "red" and PAGE in {content.text for content in model.seen}
    assert "mmeb/VisRAG_PlotQA_score.json" not in done.files
    board = done.files["mmeb/leaderboard.json"]["metrics"]["visdoc"]["VisRAG_PlotQA"]
    assert board["ndcg_linear@5"] == pytest.approx(done.results["mmeb/VisRAG_PlotQA/NDCG@5"] / 100)
    write_corpus(data / "mmeb_eval" / "VisRAG_PlotQA", judged[1:3])
    with pytest.raises(CafeError, match=r"query 0 .*VisRAG_PlotQA"):
        read_corpus(data / "mmeb_eval" / "VisRAG_PlotQA")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tgt_text": []}, "0 texts"),
        ({"tgt_text": "red"}, "0 texts"),  # not its letters
        ({"tgt_img_path": ["", ""]}, "3 texts and 2 images"),
        ({"qry_img_path": "absent.png"}, "absent.png"),
        ({"qry_text": "<|image_1|><|image_2|>"}, None),  # more marks than images: the image comes first
    ],
)
def test_a_bad_record_is_named(data, change, said):
    path = table(data / "mmeb_eval" / "SUN397.parquet", [{**color_rows()[0], **change}])
    if said is None:
        assert run(CachedModel(ByName(by_color)), data, None).results["mmeb/SUN397/P@1"] == 100
        return
    with pytest.raises(CafeError, match=said) as error:
        run(CachedModel(ByName(by_color)), data, None)
    assert path.name in str(error.value)


def test_missing_columns_broken_files_and_duplicate_datasets_are_named(data):
    path = table(data / "mmeb_eval" / "SUN397.parquet", [{"qry_text": "a"}])
    with pytest.raises(CafeError, match="qry_img_path"):
        read_records(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(CafeError, match=r"SUN397\.parquet is not valid parquet"):
        read_records(path)
    (data / "mmeb_eval" / "SUN397.jsonl").write_text("{}\n")
    with pytest.raises(CafeError, match="measure the same"):
        find_datasets(data)


def test_the_scenes_as_pages_of_documents_and_as_videos_of_a_frame(scenes, random_base, tmp_path):
    rows = json.loads((scenes / "dataset_scenes.json").read_text())["images"]
    said = {row["filename"]: row["sentences"][0]["raw"] for row in rows if row["split"] == "test"}
    folder, names = tmp_path / "mmeb_eval" / "VisRAG_SlideVQA", list(said)
    at = {name: scenes / "images" / "test" / name for name in names}
    pages = [{"corpus-id": name, "image": {"bytes": at[name].read_bytes(), "path": name}} for name in names]
    table(folder / "corpus" / "train-00000-of-00001.parquet", pages)
    asked = [{"query-id": number, "query": said[name]} for number, name in enumerate(names)]
    table(folder / "queries" / "train-00000-of-00001.parquet", asked)
    judged = [{"query-id": number, "corpus-id": name, "score": 1} for number, name in enumerate(names)]
    table(folder / "qrels" / "train-00000-of-00001.parquet", judged)
    for name in names:
        frames = tmp_path / "video-tasks" / "frames" / "video_ret" / "MSR-VTT" / Path(name).stem
        frames.mkdir(parents=True)
        shutil.copy(at[name], frames / "0000.png")
    clips = [{"video_id": Path(name).stem, "caption": said[name]} for name in names]
    table(tmp_path / "mmeb_eval" / "MSR-VTT.parquet", clips)

    done = run(CachedModel(Cafe.load(random_base)), tmp_path, 3)
    assert done.results.keys() >= {"mmeb/VisRAG_SlideVQA/NDCG@5", "mmeb/MSR-VTT/P@1", "mmeb/video/P@1"}
    pixels = {at[name].read_bytes(): number for number, name in enumerate(names)}

    def knows(content: Content) -> np.ndarray:
        if not content.images:
            return np.eye(len(names))[next(n for n, name in enumerate(names) if content.text.endswith(said[name]))]
        source = content.images[0].source
        return np.eye(len(names))[pixels[source if isinstance(source, bytes) else Path(source).read_bytes()]]

    done = run(CachedModel(ByName(knows)), tmp_path, None)
    assert done.results["mmeb/VisRAG_SlideVQA/NDCG@5"] == done.results["mmeb/MSR-VTT/P@1"] == 100


def test_mmeb_on_the_scenes_with_a_real_and_a_perfect_model(scenes, random_base, tmp_path):
    folder = tmp_path / "few"
    (folder / "mmeb_eval").mkdir(parents=True)
    (folder / "images").symlink_to(scenes / "images")
    for file in (scenes / "mmeb_eval").iterdir():
        shutil.copy(file, folder / "mmeb_eval")
    done = run(CachedModel(Cafe.load(random_base)), folder, 2)
    names = {"classification", "vqa", "retrieval", "grounding"}
    assert set(done.outputs) == {f"mmeb/{name}" for name in names}
    assert all(0 <= value <= 100 for value in done.results.values())
    assert done.results["mmeb/overall/datasets"] == 4

    right: dict[tuple, int] = {}
    rows = [row for name in sorted(names) for row in pq.read_table(folder / f"mmeb_eval/{name}.parquet").to_pylist()]

    def key(text: str, image: str) -> tuple[str, str]:
        return text.replace("<|image_1|>", "").strip("\n"), Path(image).name

    for row in rows:
        right.setdefault(key(row["tgt_text"][0], row["tgt_img_path"][0]), len(right))
    wanted = {
        key(row["qry_text"], row["qry_img_path"]): right[key(row["tgt_text"][0], row["tgt_img_path"][0])]
        for row in rows
    }

    def knows(content: Content) -> np.ndarray:
        name = key(content.text, str(content.images[0]) if content.images else "")
        at = wanted.get(name, right.get(name))
        return np.eye(len(right) + 1)[len(right) if at is None else at]

    done = run(CachedModel(ByName(knows)), folder, None)
    assert all(done.results[f"mmeb/{name}/P@1"] == 100 for name in names)
