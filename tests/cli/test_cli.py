"""The command line: overrides may stand before and behind options, what is unknown is refused, what is read counts."""

from random import Random

import pytest

from cafe.cli.main import main, parse
from cafe.data.encoding import encode_example
from cafe.data.inspection import percentiles
from cafe.data.records import Source, open_source
from cafe.lvlm.adapters import LoraSettings, add_adapter
from cafe.lvlm.image_size import set_max_image_size
from cafe.model import Cafe
from cafe.scenes.base import CROP


@pytest.fixture
def small(random_base, scenes, tmp_path):
    """A recipe that reads each picture as one crop."""
    file = tmp_path / "small.yaml"
    file.write_text(
        f"output: x\nmodel: {{base: {random_base}, grids: [[1, 1]]}}\nprompts: {{mode: multimodal}}\n"
        f"data: {{workers: 0, sources: [{{path: {scenes}/llava_train.json}}]}}\n"
    )
    return file


@pytest.mark.parametrize(
    "line",
    [
        "ablate recipe.yaml a=1 b.c=2 --seeds 5",
        "ablate recipe.yaml --seeds 5 a=1 b.c=2",
        "ablate recipe.yaml a=1 --seeds 5 b.c=2",
        "ablate --seeds 5 recipe.yaml a=1 b.c=2",
    ],
)
def test_overrides_stand_anywhere(line):
    options = parse(line.split())
    assert (str(options.recipe), options.overrides, options.seeds) == ("recipe.yaml", ["a=1", "b.c=2"], 5)


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("train recipe.yaml --sed=1", "--sed=1"),
        ("ablate recipe.yaml --seeds 5 more", "more"),
        ("report runs/a --output x.html --log l.jsonl --colour=red", "--colour=red"),
    ],
)
def test_what_is_unknown_is_refused(line, unknown, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "plan recipe.yaml --gpus 0",
        "evaluate a --limit 0",
        "ablate r.yaml --seeds -1",
        "bench-modes a --batch-sizes 1,0",
    ],
)
def test_a_number_of_things_is_above_0(line, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert "should be a whole number above 0, not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("plan r.yaml --caption -5", "a whole number above 0, not '-5'"),
        ("data check r.yaml --sample -1", "a whole number, 0 or more, not '-1'"),
        ("data check r.yaml --workers x", "a whole number, 0 or more, not 'x'"),
        ("scenes write d --train -5", "a whole number, 0 or more, not '-5'"),
        ("mine r.yaml --output d --share 95", "a number from 0 to 1, not '95'"),
    ],
)
def test_a_number_is_in_its_range(line, wanted, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert f"should be {wanted}" in capsys.readouterr().err


def test_a_picture_has_pixels(capsys):
    assert main(["plan", "recipe.yaml", "--picture", "0x480"]) == 1
    assert "--picture should be like 640x480, not '0x480'" in capsys.readouterr().err


def test_the_data_check_counts_the_tokens_that_training_reads(small, random_base, scenes, tmp_path, capsys):
    page = str(tmp_path / "page.html")
    assert main(["data", "check", str(small), "prompts={}", "--workers", "0", "--output", page]) == 0
    model = Cafe.load(random_base)
    set_max_image_size(model.lvlm, model.chat_processor.processor, grids=[(1, 1)])
    records = open_source(Source(path=f"{scenes}/llava_train.json"))
    examples = [records.example(index, Random(0)) for index in range(len(records))]
    lengths = [len(encode_example(example, model.chat_processor).query) for example in examples]
    assert f"query, tokens        {percentiles(lengths)}\n" in capsys.readouterr().out


def test_the_data_check_reads_by_an_adapters_base_and_names_what_is_none(random_base, scenes, tmp_path, capsys):
    model = Cafe.load(random_base)
    add_adapter(model.lvlm, LoraSettings())
    model.save(tmp_path / "run" / "checkpoint")
    command = ["data", "check", f"{scenes}/llava_train.json", "--sample", "2", "--workers", "0"]
    command += ["--output", str(tmp_path / "page.html"), "--base"]
    assert main([*command, str(tmp_path / "run")]) == 0
    capsys.readouterr()
    for base, sentence in (("/no", "directory /no does not exist"), (str(tmp_path), "No processor can be loaded from")):
        assert main([*command, base]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["evaluate runs/foo --data {scenes}", "data check {scenes}/llava_train.json --base runs/foo"]
)
def test_a_directory_that_is_missing_is_not_called_a_model_of_the_hub(line, scenes, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(line.format(scenes=scenes).split()) == 1
    said = capsys.readouterr().err
    assert "There is no directory runs/foo, and the Hugging Face Hub gives no" in said and said.count("\n") == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_mining_reads_as_training_does_and_by_a_checkpoint_as_that_was_trained(
    checkpoint, small, random_base, tmp_path, monkeypatch
):
    read = []
    monkeypatch.setattr("cafe.mining.hard_negatives.mine", lambda model, *rest: read.append(model.chat_processor))
    command = ["mine", str(small), "--output", str(tmp_path / "mined")]
    assert main([*command, *(["--checkpoint", str(random_base)] if checkpoint else [])]) == 0
    [chat_processor] = read
    one_crop = chat_processor.processor.image_processor.image_grid_pinpoints == [[CROP, CROP]]
    assert (chat_processor.prompts.mode == "multimodal", one_crop) == (not checkpoint, not checkpoint)


def test_a_reported_directory_may_have_an_equals_sign_in_its_name(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr("cafe.evaluation.report.page.write_report", lambda page, runs: reported.extend(runs))
    for name in ("before", "lr=1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text("{}")
    both = [f"base={tmp_path}/before", f"{tmp_path}/lr=1", f"slow={tmp_path}/lr=1"]
    assert main(["report", *both, "--output", str(tmp_path / "report.html")]) == 0
    assert [(run.name, run.directory.name) for run in reported] == [
        ("base", "before"),
        ("lr=1", "lr=1"),
        ("slow", "lr=1"),
    ]
    assert main(["report", "x=y"]) == 1


@pytest.mark.parametrize(
    "line",
    [
        "train {recipe} output={file}",
        "train {recipe} output={file}/run",
        "mine {recipe} --output {file}",
        "evaluate {base} --data {scenes} --suite retrieval --limit 2 --output {file}/results",
        "bench-modes {base} --data {scenes} --output {file}/modes.json",
        "data check {recipe} --workers 0 --output {file}/page.html",
        "scenes write {file} --train 2 --test 2",
        "scenes train-base {file}",
    ],
)
def test_a_place_that_cannot_be_written_to_is_named(line, small, random_base, scenes, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert main(line.format(recipe=small, base=random_base, scenes=scenes, file=file).split()) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"cafe: {file}") and " cannot be used: " in said
    assert file.read_text() == "kept"


def test_a_run_that_is_not_there_is_named(capsys):
    assert main(["merge", "runs/no", "merged"]) == 1
    assert capsys.readouterr().err == "cafe: The run runs/no does not exist.\n"
