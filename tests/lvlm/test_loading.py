"""Loading: nothing a model brings is run, an adapter falls back to its base's processor, and damage is a sentence."""

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cafe.cli.main import main
from cafe.errors import CafeError, CheckpointError
from cafe.lvlm.adapters import LoraSettings, add_adapter
from cafe.lvlm.loading import load_chat_processor
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe

SRC = Path(__file__).parents[2] / "src" / "cafe"
# PEFT's configuration names no code, and a processor is built of parts that are loaded as the processor is.
WITHOUT_CODE = ("PeftConfig.from_pretrained",)


def calls_that_could_run_a_models_code() -> list[tuple[str, ast.Call]]:
    """Every call of `from_pretrained` and `from_config`, with where it is and what it calls."""
    found = []
    for file in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if node.func.attr in ("from_pretrained", "from_config") and name not in WITHOUT_CODE:
                    found.append((f"{file.relative_to(SRC)}: {name}", node))
    return found


def test_every_call_of_from_pretrained_passes_trust_remote_code_false():
    calls = calls_that_could_run_a_models_code()
    assert len(calls) >= 8
    lacking = []
    for name, call in calls:
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        trust = options.get("trust_remote_code")
        if not (isinstance(trust, ast.Constant) and trust.value is False):
            lacking.append(name)
    assert not lacking


def with_code(base: Path, directory: Path, file: str) -> Path:
    """A model whose file asks for code that lies beside it and leaves a mark if it is run."""
    shutil.copytree(base, directory)
    mark = directory / "was-run"
    (directory / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    settings = json.loads((directory / file).read_text())
    settings["auto_map"] = dict.fromkeys(names, "evil.Evil")
    if file == "config.json":
        settings["model_type"] = "evil"  # transformers has no class for it, and would ask whether to run this one
    (directory / file).write_text(json.dumps(settings))
    return mark


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run_and_nothing_is_asked(random_base, tmp_path, monkeypatch, file):
    def asked(*args: object) -> str:
        raise AssertionError("a question is asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    mark = with_code(random_base, tmp_path / "model", file)
    if file == "config.json":
        with pytest.raises(CheckpointError, match="No vision-language model can be loaded from"):
            Cafe.load(tmp_path / "model")
    else:
        np.testing.assert_allclose(Cafe.load(tmp_path / "model").embed(["a"]), Cafe.load(random_base).embed(["a"]))
    assert not mark.exists()


@pytest.fixture(scope="module")
def adapter(random_base, tmp_path_factory) -> Path:
    model = Cafe.load(random_base)
    add_adapter(model.lvlm, LoraSettings(rank=2))
    directory = tmp_path_factory.mktemp("adapter") / "saved"
    model.save(directory)
    return directory


@pytest.mark.parametrize("left", [(), ("tokenizer.json", "tokenizer_config.json")], ids=["nothing", "tokenizer"])
def test_an_adapter_without_processor_files_takes_its_bases(adapter, random_base, tmp_path, left):
    """As PEFT alone, or a trainer that saves the tokenizer beside it, leaves an adapter."""
    kept = {"adapter_config.json", "adapter_model.safetensors", *left}
    shutil.copytree(adapter, tmp_path / "bare", ignore=lambda _, names: [name for name in names if name not in kept])
    expected = Cafe.load(adapter).embed(["a red circle"])
    np.testing.assert_allclose(Cafe.load(tmp_path / "bare").embed(["a red circle"]), expected, atol=1e-6)
    load_chat_processor(str(tmp_path / "bare"), Prompts())


def test_an_adapters_broken_processor_is_told_by_the_adapters_name(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "broken")
    (tmp_path / "broken" / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"No processor can be loaded from {tmp_path}/broken"):
        Cafe.load(tmp_path / "broken")


def test_an_adapters_missing_base_is_told_with_the_adapters_name(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "moved")
    file = tmp_path / "moved" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/no/longer/here"}))
    with pytest.raises(CheckpointError) as error:
        Cafe.load(tmp_path / "moved")
    assert str(error.value) == (
        f"The base model of the adapter {tmp_path}/moved is missing. There is no directory /no/longer/here."
    )


BROKEN = [  # file, field and value that it is given, or the whole file's text
    ("config.json", None, "["),
    ("config.json", None, "[1]"),
    ("config.json", None, "[" * 5000),
    ("config.json", "model_type", 5),
    ("config.json", "model_type", "unheard"),
    ("config.json", "text_config", 3),
    ("config.json", "vision_config", [1]),
    ("processor_config.json", None, "{}"),
    ("processor_config.json", "image_processor", 5),
    ("processor_config.json", "num_image_tokens", "x"),
    ("tokenizer_config.json", None, "{}"),
    ("tokenizer_config.json", "model_max_length", "x"),
    ("tokenizer.json", None, "{}"),
    ("tokenizer.json", "model", []),
    ("adapter_config.json", None, "5"),
    ("adapter_config.json", "r", "x"),
    ("adapter_config.json", "peft_type", 5),
    ("adapter_config.json", "base_model_name_or_path", "x" * 5000),
    ("adapter_config.json", "target_modules", {"a": 1}),
    ("cafe.json", "prompts", 5),
    ("cafe.json", "recipe", []),
]


@pytest.mark.parametrize(("file", "field", "value"), BROKEN)
def test_a_broken_file_of_a_model_ends_in_one_sentence(adapter, random_base, tmp_path, file, field, value, capsys):
    source = adapter if file in ("adapter_config.json", "cafe.json") else random_base
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    text = value
    if field is not None:
        text = json.dumps(json.loads((broken / file).read_text()) | {field: value})
    (broken / file).write_text(text)
    with pytest.raises(CafeError) as error:
        Cafe.load(broken)
    assert "\n" not in str(error.value).strip()
    (tmp_path / "0.jpg").touch()
    assert main(["bench-modes", str(broken), "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("cafe: ")


TEMPLATES = {
    "syntax": "{% for x in %}",
    "refusal": "{{ raise_exception('no') }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "change": "{{ messages.clear() }}",
    "file": "{% include '/etc/passwd' %}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "size": "{% for a in range(9999) %}{{ '<image>' * 100 }}{% endfor %}",
    "silent": "nothing that the chat says",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_hostile_or_broken_chat_template_ends_in_one_sentence(random_base, tmp_path, template):
    shutil.copytree(random_base, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError) as error:
        load_chat_processor(str(tmp_path / "model"), Prompts())
    assert "chat template" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
