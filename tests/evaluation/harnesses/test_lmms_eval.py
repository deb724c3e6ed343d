"""The plug-in for lmms-eval. Where lmms-eval is installed (see docs/suites/understanding.md), in lmms-eval itself.

Elsewhere the names that the plug-in imports are stood in for, and what is held is how it answers requests of
lmms-eval's form.
"""

import sys
import tomllib
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from cafe import Cafe
from cafe.content import Content
from cafe.errors import CafeError
from cafe.scenes.draw import paint
from cafe.scenes.world import draw_scene

INSTALLED = find_spec("lmms_eval") is not None


@dataclass
class Request:
    """What lmms-eval gives, as far as the plug-in reads it."""

    args: tuple


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lmms:
        def __init__(self) -> None:
            self.task_dict: dict = {}

    names = {"api.instance": {"Instance": Request}, "api.model": {"lmms": Lmms}}
    names["models.registry_v2"] = {"ModelManifest": lambda **fields: fields}
    for name in ("", "api", "models", *names):
        module = ModuleType(f"lmms_eval.{name}".rstrip("."))
        module.__dict__.update(names.get(name, {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def plugin(monkeypatch):
    if not INSTALLED:
        monkeypatch.delitem(sys.modules, "cafe.evaluation.harnesses.lmms_eval", raising=False)
        stand_in(monkeypatch)
    from cafe.evaluation.harnesses import lmms_eval

    return lmms_eval


@pytest.fixture(scope="module")
def model(random_base):
    return Cafe.load(random_base)


IMAGES = [paint(draw_scene(0, "test", number)) for number in range(2)]


@pytest.fixture
def wrapped(plugin, model):
    wrapped = plugin.CafeModel(model, batch_size=2)
    wrapped.task_dict = {"task": {"test": [{"image": image, "target": "a circle"} for image in IMAGES]}}
    return wrapped


def visuals(document: dict) -> list[Image.Image]:
    return [document["image"]]


def asked(words: str, document: int, **options) -> Request:
    return Request((words, options, visuals, document, "task", "test"))


def test_the_entry_point_names_the_class_and_stands_apart_from_it(plugin):
    declared = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = declared["lmms_eval.models"]["cafe"].partition(":")
    assert module != plugin.__name__  # which lmms-eval may be asked for by, before anything of it is there
    made = getattr(import_module(module), name)()
    path = made["simple_class_path"] if isinstance(made, dict) else made.simple_class_path
    assert path == f"{plugin.__name__}.CafeModel"


def test_answers_are_cafes_in_the_order_asked_whatever_the_options(wrapped, model):
    words = ["What is it?", "Look: <image>\nHow many?"]
    requests = [asked(words[0], 0, max_new_tokens=4, until=["\n\n"]), asked(words[1], 1, max_new_tokens=3)]
    prompts = [Content.of([IMAGES[0], words[0]]), Content.of(["Look: ", IMAGES[1], "How many?"])]
    expected = [model.generate_batch([p], max_new_tokens=n)[0] for p, n in zip(prompts, (4, 3), strict=True)]
    assert wrapped.generate_until(requests) == expected
    assert wrapped.generate_until(requests[::-1]) == expected[::-1]


def test_sampling_is_done_where_a_task_asks_for_it(wrapped):
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        said.append(wrapped.generate_until([asked("What?", 0, max_new_tokens=12, temperature=5.0)])[0])
    assert said[0] == said[1] != said[2]
    greedy = asked("What?", 0, max_new_tokens=4, temperature=5.0, do_sample=False)
    assert wrapped.generate_until([greedy]) == wrapped.generate_until([asked("What?", 0, max_new_tokens=4)])


def test_the_loss_of_a_continuation_is_the_mean_over_its_tokens(wrapped, model):
    target = lambda document: document["target"]  # noqa: E731
    requests = [
        Request(("What is it?", "a red square", visuals, 0, "task", "test")),
        Request(("What is it?", target, visuals, 1, "task", "test")),
    ]
    found = wrapped.loglikelihood(requests)
    for (loss, greedy), image, text in zip(found, IMAGES, ("a red square", "a circle"), strict=True):
        tokens = len(model.chat_processor.tokenizer(text, add_special_tokens=False).input_ids) + 1
        assert loss == pytest.approx(-model.score([image, "What is it?"], text) / tokens, abs=1e-4)
        assert greedy == (model.generate(image, "What is it?", max_new_tokens=tokens) == text)


def test_images_go_to_their_marks_or_first_and_videos_are_refused(plugin):
    one, two = IMAGES
    parts = plugin.content("a <image> b <image>", [one, two]).parts
    assert [isinstance(part, str) for part in parts] == [True, False, True, False]
    parts = plugin.content("a <image> b", [one, two]).parts
    assert [isinstance(part, str) for part in parts] == [False, False, True] and parts[2] == "a <image> b"
    assert plugin.content("words alone", []).parts == ("words alone",)
    with pytest.raises(CafeError, match="gives a str"):
        plugin.content("What?", ["video.mp4"])


def test_an_answer_ends_before_its_stop_words_not_at_blank_lines(plugin):
    assert plugin.cut("A. because\n\nof it", ["\n\n", "."]) == "A"
    assert plugin.cut("one\n\ntwo", ["\n\n"]) == "one\n\ntwo"
    assert plugin.cut(" one USER: two", "USER:") == "one"


if INSTALLED:

    def test_lmms_eval_finds_the_model_by_name_and_runs_a_local_task(model, random_base, tmp_path):
        import json

        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.models import get_model
        from lmms_eval.tasks import TaskManager

        assert get_model("cafe").__name__ == "CafeModel"
        rows = []
        for number, image in enumerate(IMAGES):
            image.save(tmp_path / f"{number}.png")
            answer = model.generate(image, "What?", max_new_tokens=3)
            rows.append({"image": str(tmp_path / f"{number}.png"), "answer": [answer, "never said"][number]})
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = tmp_path / "tasks"
        tasks.mkdir()
        (tasks / "utils.py").write_text(
            "from PIL import Image\n\n\ndef visual(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n"
            "\n\ndef text(doc, lmms_eval_specific_kwargs=None):\n    return 'What?'\n"
        )
        (tasks / "tiny.yaml").write_text(
            f"task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
            "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
            "doc_to_text: !function utils.text\ndoc_to_target: answer\ngeneration_kwargs:\n  max_new_tokens: 3\n"
            "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
        )
        results = simple_evaluate(
            "cafe",
            f"pretrained={random_base}",
            tasks=["tiny"],
            batch_size=2,
            device="cpu",
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False, model_name="cafe"),
        )
        assert results["results"]["tiny"]["exact_match,none"] == 0.5
        assert Path(results["configs"]["tiny"]["dataset_path"]).name == "json"
