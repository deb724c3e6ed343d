"""What a checkpoint records about itself is checked when it is read, as a recipe is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import ANY_JSON

from cafe.checkpoint import METADATA_FILE, prompts_from_metadata, read_metadata
from cafe.errors import CafeError, CheckpointError
from cafe.export import model_card
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe

GOOD: dict[str, Any] = {
    "prompts": asdict(Prompts()),
    "temperature": 0.05,
    "steps": 3,
    "recipe": {
        "model": {"base": "a"},
        "data": {"sources": [{"path": "a.json"}]},
        "objective": {"matryoshka_dims": [8]},
    },
    "results": {"vqa/all": 1.0},
    "versions": {"torch": "2"},
}


def fields_of(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field in nested mappings."""
    if not isinstance(tree, dict):
        return []
    return [found for name, value in tree.items() for found in ((*path, name), *fields_of(value, (*path, name)))]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(field=st.sampled_from([(), *fields_of(GOOD)]), value=ANY_JSON)
def test_any_value_in_any_field_of_cafe_json_is_taken_or_refused_in_a_sentence(directory, field, value):
    tree = json.loads(json.dumps(GOOD))
    inner = tree
    for name in field[:-1]:
        inner = inner[name]
    if field:
        inner[field[-1]] = value
    (directory / METADATA_FILE).write_text(json.dumps(tree if field else value))
    try:
        metadata = read_metadata(directory)
        model_card(metadata).encode()
        prompts = prompts_from_metadata(metadata)
    except CafeError as error:
        assert "\n" not in str(error)
    else:
        assert prompts.mode in ("compress", "multimodal") and prompts.assistant_frame in ("closed", "open")
        asdict(prompts)["system"].encode()


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({"assistant_frame": "Closed"}, "prompts.assistant_frame should be one of closed, open, not 'Closed'."),
        ({"frame": "Closed"}, "prompts.frame is now called prompts.assistant_frame."),
        ({"mode": None}, "prompts.mode should be one of compress, multimodal, not None."),
        ({"chat_template": "Family"}, "prompts.chat_template should be one of chatml, family, not 'Family'."),
        ({"system": 5}, "prompts.system should be text, not 5."),
        ({"system": "\ud83d"}, "prompts.system holds half of a character, or a null: '\\ud83d'."),
        ({"sytem": ""}, "the key prompts.sytem is unknown; the nearest is prompts.system."),
    ],
)
def test_prompts_that_are_none_are_refused_with_the_recipes_sentence(random_base, tmp_path, prompts, sentence):
    """`frame: "Closed"` loaded and gave other vectors."""
    Cafe.load(random_base).save(tmp_path / "saved")
    file = tmp_path / "saved" / METADATA_FILE
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"prompts": metadata["prompts"] | prompts}))
    with pytest.raises(CheckpointError) as error:
        Cafe.load(tmp_path / "saved")
    assert str(error.value) == f"This version does not know the prompts of the checkpoint's cafe.json: {sentence}"


@pytest.mark.parametrize(
    "change", [{"assistant_frame": "Closed"}, {"mode": "Compress"}, {"system": 5}, {"image_instruction": None}]
)
def test_prompts_made_in_python_are_checked_too(change):
    with pytest.raises(CafeError, match=f"prompts.{next(iter(change))} should be "):
        Prompts(**change)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a mapping"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"temperature": "hot"}', "temperature should be a number, not 'hot'"),
        ('{"recipe": 5}', "recipe should be a mapping, not 5"),
    ],
)
def test_a_broken_cafe_json_is_told_in_a_sentence(tmp_path, text, sentence):
    (tmp_path / METADATA_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=sentence) as error:
        read_metadata(tmp_path)
    assert "\n" not in str(error.value)
