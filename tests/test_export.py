"""What a checkpoint holds for other software: sentence-transformers reads the same embeddings from it."""

import base64
import json
import re
from dataclasses import asdict, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import families
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi
from model_samples import PREFIX_LMS, SMALL, TALL, WIDE, make
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import VIDEO_PROCESSOR_NAME
from transformers.video_processing_utils import BaseVideoProcessor

from cafe.cli.main import main
from cafe.cli.training import _read_results
from cafe.content import Content
from cafe.export import model_card
from cafe.images.resizing import with_torch_resize
from cafe.lvlm.loading import load_processor
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe

CONTENTS = ["a red circle", SMALL, {"image": WIDE, "text": "what is left of it?"}, "a blue square to the left", TALL]
ALONE = {"llava", "llava_next", "idefics3", "gemma3", "aya_vision", "ovis2"}  # their processors need no torchvision


TAKE_TEXT = [family for family in families.FAMILIES if family not in PREFIX_LMS]
FRAMES = [*((family, "closed", "compress") for family in TAKE_TEXT), ("llava", "open", "compress")]


@pytest.mark.parametrize(("family", "frame", "mode"), [*FRAMES, ("qwen2_5_vl", "open", "multimodal")])
def test_sentence_transformers_gives_our_embeddings_of_text_image_and_both(family, frame, mode, tmp_path, monkeypatch):
    model = make(family)
    model.chat_processor.prompts = replace(model.chat_processor.prompts, assistant_frame=frame, mode=mode)
    model.save(tmp_path / "saved")
    expected = Cafe.load(tmp_path / "saved").embed(CONTENTS)
    if family not in ALONE:  # without torchvision the processor cannot be read as it is; the files are the same
        monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda path, **options: load_processor(str(path)))
    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose((theirs.encode(CONTENTS) * expected).sum(1), 1, atol=1e-4)  # with Pillow's resize
    processor = theirs[0].processor
    processor.image_processor = with_torch_resize(processor.image_processor)
    for found in (theirs.encode(CONTENTS), np.stack([theirs.encode(content) for content in CONTENTS])):
        np.testing.assert_allclose((found * expected).sum(1), 1, atol=1e-4)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_checkpoint_has_the_video_settings_that_its_processor_declares(family, tmp_path):
    model = make(family)
    model.save(tmp_path / "made")
    declared = "video_processor" in type(model.chat_processor.processor).__mro__[1].get_attributes()
    assert (tmp_path / "made" / VIDEO_PROCESSOR_NAME).is_file() == declared
    if not declared:
        return
    found, _ = BaseVideoProcessor.get_video_processor_dict(tmp_path / "made")  # as transformers looks for them
    assert found["image_mean"] == list(model.chat_processor.processor.image_processor.image_mean)
    # And a base's own stay: as they lie on the Hub, then as they were saved.
    (tmp_path / "made" / VIDEO_PROCESSOR_NAME).write_text('{"num_frames": 5}')
    for before, after in (("made", "once"), ("once", "twice")):
        Cafe.load(tmp_path / before).save(tmp_path / after)
        assert json.loads((tmp_path / after / VIDEO_PROCESSOR_NAME).read_text()) == {"num_frames": 5}


@pytest.mark.parametrize("family", PREFIX_LMS)
def test_a_prefix_lms_checkpoint_loads_in_transformers_and_has_no_template(family, tmp_path):
    model, saved = make(family), tmp_path / "saved"
    model.save(saved)
    assert not {file.name for file in saved.iterdir()} & {"modules.json", "chat_template.jinja"}
    card = (saved / "README.md").read_text()
    assert "library_name: transformers" in card and "SentenceTransformer" not in card
    inputs = AutoProcessor.from_pretrained(saved)(images=[[WIDE]], text=["<image>What is it?"], return_tensors="pt")
    output = AutoModelForImageTextToText.from_pretrained(saved).generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = model.chat_processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.generate(WIDE, "What is it?", max_new_tokens=6) == answer.strip() != ""


def test_the_embedding_template_renders_what_servers_send(tmp_path):
    model = make("qwen2_5_vl")
    model.save(tmp_path / "saved")
    template = (tmp_path / "saved" / "embedding_template.jinja").read_text()
    processor = model.chat_processor.processor
    for content in ("a red circle", [{"type": "text", "text": "a red circle"}]):
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode_embedding(Content.of("a red circle")).input_ids.tolist()
    # And conversations go on by the family's own template.
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == processor.chat_template


RECORD = {
    "prompts": asdict(Prompts()),
    "temperature": 0.05,
    "steps": 12,
    "versions": {"torch": "2.13.0"},
    "recipe": {
        "model": {"base": "owner/base-model"},
        "data": {"sources": [{"path": "captions.json"}]},
        "objective": {"matryoshka_dims": [64, 128]},
    },
}


def test_the_model_card_shows_results_data_and_recipe():
    card = model_card(RECORD, {"retrieval/image_to_text/R@1": 61.25})
    _, about, text = card.split("---\n", 2)
    assert yaml.safe_load(about)["base_model"] == "owner/base-model"
    assert "| retrieval/image_to_text/R@1 | 61.250 |" in text and "- `captions.json`" in text
    assert "The prompt frame is `closed`." in text
    assert "first 64, 128 dimensions" in text and "Compress this image in one word:" in text
    shown = [yaml.safe_load(block) for block in re.findall("```yaml\n(.*?)\n```", text, re.S)]
    assert shown == [{name: RECORD[name] for name in ("steps", "temperature", "versions")}, RECORD["recipe"]]
    best = model_card(RECORD | {"results": {"held_out/lm_loss": 1.5}})
    assert "| held_out/lm_loss | 1.500 |" in best
    bare = model_card({"prompts": asdict(Prompts())}, library="peft")
    assert "No results are recorded." in bare and "library_name: peft" in bare and "base_model" not in bare


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs: every file goes into its commit as it is."""

    def do_POST(self) -> None:
        """Answers, and keeps what was committed."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            said = {
                "commitUrl": "https://huggingface.co/owner/name/commit/1",
                "commitOid": "1" * 40,
                "pullRequestUrl": None,
            }
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            said = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif self.path != "/api/repos/create":  # the card's head is sent to be checked
            said = {"errors": [], "warnings": []}
        else:
            self.server.made = json.loads(body)
            said = {"url": f"{self.server.url}/owner/name", "name": "owner/name", "id": "1"}
        answer = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("cafe.export.HfApi", partial(HfApi, endpoint=server.url, token="hf_test"))
    yield server
    server.shutdown()
    server.server_close()


def test_push_uploads_every_file_and_a_model_card_with_results(hub, tmp_path, capsys):
    checkpoint, results = tmp_path / "run" / "checkpoint", tmp_path / "results"
    checkpoint.mkdir(parents=True)
    results.mkdir()
    (checkpoint / "cafe.json").write_text(json.dumps(RECORD))
    (checkpoint / "README.md").write_text("without results")
    (checkpoint / "model.safetensors").write_bytes(bytes(1000))
    (results / "results.json").write_text('{"captions/exact": 90.0}')
    assert main(["push", str(tmp_path / "run"), "owner/name", "--results", str(results)]) == 0
    assert hub.url in capsys.readouterr().out
    assert hub.made["name"] == "name" and hub.made["visibility"] == "private"
    assert set(hub.files) == {"cafe.json", "README.md", "model.safetensors"}
    assert hub.files["model.safetensors"] == bytes(1000)
    assert "| captions/exact | 90.000 |" in hub.files["README.md"].decode()


def test_push_to_an_unreachable_hub_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cafe.export.HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="hf_test"))
    (tmp_path / "cafe.json").write_text(json.dumps(RECORD))
    assert main(["push", str(tmp_path), "owner/name"]) == 1
    said = capsys.readouterr().err
    assert "cannot be pushed to owner/name: " in said and said.count("\n") == 1


def test_push_of_what_is_no_checkpoint_is_reported(hub, tmp_path, capsys):
    (tmp_path / "cafe.json").write_text(json.dumps(RECORD))
    wrong = [
        (["push", str(tmp_path / "no"), "owner/name"], "is no checkpoint of cafe"),
        (["push", str(tmp_path), "owner/name", "--results", str(tmp_path)], "has no results.json"),
        (["push", str(tmp_path), "owner/name/more"], "cannot be pushed to owner/name/more"),
    ]
    for arguments, sentence in wrong:
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1


EVIL = "x`\n<script>alert(1)</script>\n---\n# Title\n[a](http://e)|``` \x1b[31m"


def spans_removed(text: str) -> str:
    """A Markdown text without its code blocks and inline code, by CommonMark's rule for both."""
    text = re.sub(r"^(`{3,})yaml\n.*?\n\1$", "", text, flags=re.S | re.M)
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S)


def test_the_model_card_shows_what_a_checkpoint_tells_as_code_alone():
    """A base's name, a data path, a prompt, a result's name and a recipe's text may be a stranger's."""
    prompts = asdict(Prompts()) | {"system": EVIL, "image_instruction": EVIL, "text_instruction": EVIL}
    recipe = {
        "model": {"base": EVIL},
        "data": {"sources": [{"path": EVIL}, "no source", {}]},
        "objective": {"matryoshka_dims": [64, "<b>"]},
        "seed": "```\n<script>",
    }
    card = model_card({"prompts": prompts, "recipe": recipe, "results": {EVIL: 1.0, "a/b": 2.0, "c": "<i>"}})
    _, about, text = card.split("---\n", 2)
    assert yaml.safe_load(about).keys() == {"library_name", "pipeline_tag", "tags"}
    plain = spans_removed(text)
    for mark in ("<", "# Title", "](http", "\x1b", "`"):
        assert mark not in plain.replace("](https://arxiv.org", ""), mark
    assert "\x1b" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3]  # of two cells each
    assert "| a/b | 2.000 |" in text and "first 64 dimensions" in text


def test_a_card_is_written_from_what_little_a_checkpoint_tells():
    for metadata in ({"steps": 1}, {"recipe": {"model": 5, "data": []}}, {"prompts": {"system": None}}):
        assert "# A model that retrieves and generates" in model_card(metadata)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "b"}', "[" * 100_000])
def test_broken_results_are_told_in_a_sentence(tmp_path, text, capsys):
    (tmp_path / "cafe.json").write_text(json.dumps(RECORD))
    (tmp_path / "results.json").write_text(text)
    assert main(["push", str(tmp_path), "owner/name", "--results", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/results.json is not " in said and said.count("\n") == 1


def test_results_without_a_value_are_left_out_of_the_card(tmp_path):
    """`cafe evaluate` writes null for what is not a number."""
    (tmp_path / "results.json").write_text('{"vqa/all": 50.0, "geometry/modality_gap": null}')
    assert _read_results(tmp_path) == {"vqa/all": 50.0}
