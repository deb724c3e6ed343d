"""The command line: arguments and their ranges, errors and exit status, and the models that commands read with."""

import os
import subprocess
import sys
from random import Random

import click
import pytest

from cafe.cli.evaluation import _parse_evaluation, ablate_command
from cafe.cli.main import cli, main
from cafe.data.encoding import encode_example
from cafe.data.inspection import percentiles
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError, RunInterrupted
from cafe.lvlm.adapters import LoraSettings, add_adapter
from cafe.lvlm.image_size import set_max_image_size
from cafe.model import Cafe
from cafe.scenes.base import MODEL


@pytest.fixture
def small(random_base, scenes, tmp_path):
    """A recipe that reads each image as one crop."""
    file = tmp_path / "small.yaml"
    file.write_text(
        f"output: x\nmodel: {{base: {random_base}, image_grids: [[1, 1]]}}\nprompts: {{mode: multimodal}}\n"
        f"data: {{num_workers: 0, sources: [{{path: {scenes}/llava_train.json}}]}}\n"
    )
    return file


@pytest.mark.parametrize(
    "line",
    [
        "recipe.yaml a=1 b.c=2 --seeds 5",
        "recipe.yaml --seeds 5 a=1 b.c=2",
        "recipe.yaml a=1 --seeds 5 b.c=2",
        "--seeds 5 recipe.yaml a=1 b.c=2",
    ],
)
def test_overrides_stand_before_between_and_after_options(line):
    options = ablate_command.make_context("ablate", line.split()).params
    assert (str(options["recipe"]), options["overrides"], options["seeds"]) == ("recipe.yaml", ("a=1", "b.c=2"), 5)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train recipe.yaml --sed=1", "No such option '--sed'"),
        ("ablate recipe.yaml --seeds 5 more", "'more' is not of the form key=value."),
        ("report runs/a --output x.html --log l.jsonl --colour=red", "No such option '--colour'"),
        ("evaluate a b", "Got unexpected extra argument (b)"),
        ("train", "Missing argument 'RECIPE'"),
        ("mine r.yaml", "Missing option '--output'"),
        ("trian recipe.yaml", "No such command 'trian'"),
        ("data chek a.json", "No such command 'chek'"),
    ],
)
def test_unknown_and_missing_arguments_exit_with_status_2(line, sentence, capsys):
    assert main(line.split()) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and not printed.out


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("plan recipe.yaml --gpus 0", "--gpus"),
        ("evaluate a --limit 0", "--limit"),
        ("ablate r.yaml --seeds -1", "--seeds"),
        ("bench-modes a --data d --batch-sizes 1,0", "--batch-sizes"),
        ("plan r.yaml --caption -5", "--caption"),
    ],
)
def test_a_count_is_a_whole_number_above_0(line, option, capsys):
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert f"Invalid value for '{option}'" in error and "is not in the range x>=1" in error


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("data check r.yaml --sample -1", "'--sample': -1 is not in the range x>=0"),
        ("data check r.yaml --workers x", "'--workers': 'x' is not a valid integer"),
        ("data check r.yaml --workers 1.5", "'--workers': '1.5' is not a valid integer"),
        ("scenes write d --train -5", "'--train': -5 is not in the range x>=0"),
        ("mine r.yaml --output d --max-positive-ratio 95", "'--max-positive-ratio': 95.0 is not in the range 0<=x<=1"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_range(line, sentence, capsys):
    assert main(line.split()) == 2
    assert f"Invalid value for {sentence}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--sweep objective.temperatur=1", "objective.temperatur is unknown; the nearest is objective.temperature"),
        ("--sweep objective.temperature=1,hot", "objective.temperature should be a number, not 'hot'"),
        ("--sweep seed=1,2", "The ablation itself sets seed"),
        ("--sweep evaluation.limit=1,2", "The ablation itself sets evaluation.limit"),
        ("--arm contrast", "There is no arm 'contrast'; the arms are contrastive, language, joint"),
    ],
)
def test_a_mistake_in_an_ablation_is_reported_before_a_model_is_loaded(option, sentence, small, scenes, capsys):
    words = ["ablate", str(small), "model.base=none", f"evaluation.data={scenes}", *option.split()]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("image", ["0x480", "640", "640x", "-640x480", "ax480"])
def test_the_plans_image_has_a_width_and_a_height(image, capsys):
    assert main(["plan", "recipe.yaml", "--image", image]) == 1
    assert capsys.readouterr().err == f"cafe: --image should be like 640x480, not {image!r}.\n"


@pytest.mark.parametrize(
    ("words", "threshold"),
    [
        ("", None),
        ("--judge", 0.5),
        ("--judge 0.7", 0.7),
        ("--judge --soft", 0.5),
        ("--soft", 0.5),
        ("--judge 0 --soft", 0),
    ],
)
def test_the_judges_probability_may_be_left_out(words, threshold, small, random_base, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(
        "cafe.mining.hard_negatives.mine", lambda model, sources, output, mining, *_: configs.append(mining)
    )
    assert main(["mine", str(small), "--output", str(tmp_path / "mined"), *words.split()]) == 0
    assert configs[0].judge == threshold and configs[0].soft == ("--soft" in words)


def test_every_command_and_option_has_a_help_text(capsys):
    for path, command in iterate_commands(cli):
        assert command.get_short_help_str(200), path
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        assert all(option.help for option in options), path
        assert main([*path, "--help"]) == 0
        assert capsys.readouterr().out.startswith(" ".join(["Usage: cafe", *path]))


def iterate_commands(command, path=()):
    """Yield each command with the words that lead to it."""
    yield path, command
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from iterate_commands(subcommand, (*path, name))


def test_the_help_does_not_import_torch():
    code = (
        "import sys; from cafe.cli.main import main; main(['--help'])\n"
        "print({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "quickstart" in done.stdout and done.stdout.endswith("set()\n")


def test_the_package_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cafe", "merge", "runs/no", "merged"], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (1, "cafe: The run runs/no does not exist.\n")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (CafeError("A file is wrong."), 1, "A file is wrong."),
        (RunInterrupted("Saved at step 3.", 15), 143, "Saved at step 3."),
        (KeyboardInterrupt(), 130, "stopped."),
        (
            FileNotFoundError(2, "No such file or directory", "a.json"),
            1,
            "a.json cannot be used: No such file or directory.",
        ),
    ],
)
def test_an_error_is_one_line_and_an_exit_status(error, status, message, monkeypatch, capsys):
    raise_in_scenes(error, monkeypatch)
    assert main(["scenes", "write", "d"]) == status
    assert capsys.readouterr().err == f"cafe: {message}\n"


@pytest.mark.parametrize("error", [OSError("no path"), EOFError("cut"), ValueError("ours")], ids=repr)
def test_an_error_that_is_not_the_users_has_a_traceback(error, monkeypatch):
    raise_in_scenes(error, monkeypatch)
    with pytest.raises(type(error)):
        main(["scenes", "write", "d"])


def raise_in_scenes(error, monkeypatch):
    """Let `cafe scenes write` raise an error."""

    def write_scenes(*arguments):
        raise error

    monkeypatch.setattr("cafe.scenes.write.write_scenes", write_scenes)


def test_the_data_check_counts_the_tokens_that_training_reads(small, random_base, scenes, tmp_path, capsys):
    page = str(tmp_path / "page.html")
    assert main(["data", "check", str(small), "prompts={}", "--workers", "0", "--output", page]) == 0
    model = Cafe.load(random_base)
    set_max_image_size(model.lvlm, model.chat_processor.processor, grids=[(1, 1)])
    records = open_source(Source(path=f"{scenes}/llava_train.json"))
    examples = [records.example(index, Random(0)) for index in range(len(records))]
    lengths = [len(encode_example(example, model.chat_processor).query) for example in examples]
    assert f"query, tokens        {percentiles(lengths)}\n" in capsys.readouterr().out


def test_the_data_check_reads_adapters_and_names_a_missing_base(random_base, scenes, tmp_path, capsys):
    model = Cafe.load(random_base)
    add_adapter(model.lvlm, LoraSettings())
    model.save(tmp_path / "run" / "checkpoint")
    command = ["data", "check", f"{scenes}/llava_train.json", "--sample", "2", "--workers", "0"]
    command += ["--output", str(tmp_path / "page.html"), "--base"]
    assert main([*command, str(tmp_path / "run")]) == 0
    capsys.readouterr()
    for base, sentence in (("/no", "directory /no does not exist"), (str(tmp_path), "No processor can be loaded from")):
        assert main([*command, base]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["evaluate missing/foo --data {scenes}", "data check {scenes}/llava_train.json --base missing/foo"]
)
def test_a_missing_directory_is_not_taken_for_a_hub_model(line, scenes, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(line.format(scenes=scenes).split()) == 1
    error = capsys.readouterr().err
    assert "There is no directory missing/foo, the Hub's cache holds no model of that name" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_mining_uses_the_recipes_prompts_or_the_checkpoints_own(checkpoint, small, random_base, tmp_path, monkeypatch):
    processors = []
    monkeypatch.setattr("cafe.mining.hard_negatives.mine", lambda model, *rest: processors.append(model.chat_processor))
    command = ["mine", str(small), "--output", str(tmp_path / "mined")]
    assert main([*command, *(["--checkpoint", str(random_base)] if checkpoint else [])]) == 0
    [chat_processor] = processors
    one_crop = chat_processor.processor.image_processor.image_grid_pinpoints == [[MODEL.crop, MODEL.crop]]
    assert (chat_processor.prompts.mode == "multimodal", one_crop) == (not checkpoint, not checkpoint)


def test_report_accepts_directories_with_an_equals_sign(tmp_path, monkeypatch):
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
def test_an_output_that_cannot_be_written_is_named(line, small, random_base, scenes, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert main(line.format(recipe=small, base=random_base, scenes=scenes, file=file).split()) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"cafe: {file}") and " cannot be used: " in error
    assert file.read_text() == "kept"


def test_merge_names_a_missing_run(capsys):
    assert main(["merge", "runs/no", "merged"]) == 1
    assert capsys.readouterr().err == "cafe: The run runs/no does not exist.\n"


@pytest.mark.parametrize(
    "words", [["evaluate", "--list"], ["evaluate", "--help"], ["--help"], ["evaluate", "none", "--data", "none"]]
)
@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stderr"]])
def test_a_command_into_a_closed_pipe_ends_quietly(words, closed, tmp_path):
    read, write = os.pipe()
    os.close(read)  # nobody reads, as after `| head` has printed its lines
    with (tmp_path / "stderr").open("w") as stderr:
        done = subprocess.run(
            [sys.executable, "-m", "cafe", *words],
            stdout=write,
            stderr=write if "stderr" in closed else stderr,
            check=False,
        )
    os.close(write)
    mistake = ["cafe: The folder of evaluation files none does not exist."] if words[-1] == "none" else []
    said = (tmp_path / "stderr").read_text().splitlines()
    assert said == ([] if "stderr" in closed else mistake)
    assert done.returncode == (1 if mistake else 141)


def test_head_ends_the_list_of_suites():
    command = f"{sys.executable} -m cafe evaluate --list | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("retrieval: ") and done.stderr == ""


def path_parameters() -> list[tuple[str, click.Command, click.Parameter]]:
    """Every path argument and option of every command."""
    commands = {name: command for name, command in cli.commands.items() if not isinstance(command, click.Group)}
    for group in (command for command in cli.commands.values() if isinstance(command, click.Group)):
        commands |= {f"{group.name} {name}": command for name, command in group.commands.items()}
    found = []
    for name, command in commands.items():
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                found.append((f"{name} {parameter.name}", command, parameter))
    return found


def test_a_leading_tilde_is_the_home_directory_in_every_path_of_the_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    parameters = path_parameters()
    assert len(parameters) >= 18
    for name, command, parameter in parameters:
        context = click.Context(command)
        assert str(parameter.type_cast_value(context, "~/a/~b")) == "/home/someone/a/~b", name
        assert str(parameter.type_cast_value(context, "a/~")) == "a/~", name


def test_a_tilde_leads_home_where_a_path_is_a_part_of_a_word(tmp_path, monkeypatch, random_base, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    for word in ("~/run", "named=~/run"):
        assert _parse_evaluation(word) == (word.partition("=")[0].rpartition("/")[2], tmp_path / "run")
    model = Cafe.load(random_base)
    model.save("~/saved")
    assert (tmp_path / "saved" / "cafe.json").is_file() and not (tmp_path / "~").exists()
    assert Cafe.load("~/saved").metadata["prompts"] == model.metadata["prompts"]
