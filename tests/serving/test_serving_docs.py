"""The page on serving: its examples run against a server, and its files for deployment name what exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from collection_samples import add
from samples import noise

from cafe.cli.serve import serve_command
from cafe.index.collection import Collection
from cafe.model import Cafe
from cafe.serving.config import EngineConfig, RequestLimits
from cafe.serving.contents import DOWNLOAD_SECONDS
from cafe.serving.schemas import MAX_FIELDS
from cafe.serving.server import running_server

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
URL, MODEL = "http://127.0.0.1:8000", "mine"
CURL = ["Embeddings", "Chat", "Rerank and score", "Health and metrics"]


def blocks(section: str, language: str) -> list[str]:
    """Return the code blocks of a section."""
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.MULTILINE | re.DOTALL)


def for_server(code: str, url: str, model_id: str) -> str:
    """Replace the address and the model's name by those of a server."""
    return code.replace(URL, url).replace(f'"{MODEL}"', f'"{model_id}"')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with a cat in which the examples run."""
    noise(0, 48, 40).save(tmp_path / "cat.jpg", "JPEG")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(code: str, url: str, model_id: str) -> str:
    """Run the commands of an example, none of which may fail, and return what they print."""
    code = for_server(code.replace("curl ", "curl --fail-with-body -sS "), url, model_id)
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout
    return done.stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize("section", CURL)
def test_curl_examples_of_the_page_are_answered(section, url, model_id, folder):
    for code in blocks(section, "sh"):
        assert run_shell(code, url, model_id)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_examples_of_a_collection_are_answered(services, random_base, folder):
    pytest.importorskip("lancedb")
    collection = Collection.open(folder / "gallery", Cafe.load(random_base))
    assert add(collection, folder / "cat.jpg") == {"added": 1}
    with running_server(replace(services, collection=collection)) as url:
        [code] = blocks("A collection", "sh")
        printed = run_shell(code, url, services.model_id)
    assert '"name":"cat.jpg"' in printed.replace(" ", "")  # of /search
    assert '"sources"' in printed and '"done"' in printed  # of /ask
    assert str(folder) not in printed


@pytest.fixture
def namespace(url: str, model_id: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[dict]:
    """What the examples for OpenAI's client define, once they have run; what they print is captured."""
    names: dict = {"__name__": "serving"}
    for section in ("Embeddings", "Chat"):
        for code in blocks(section, "python"):
            exec(for_server(code, url, model_id), names)
    yield names
    names["client"].close()


def test_openai_examples_of_the_page_run(namespace, served_model, capsys):
    counts, _, answer = capsys.readouterr().out.partition("\n")
    assert counts == f"2 2 {served_model.lvlm.config.get_text_config().hidden_size}"
    assert answer == served_model.generate(Path("cat.jpg"), "Describe the image.", 64)


@pytest.mark.parametrize(
    ("section", "package"), [("LangChain", "langchain_openai"), ("LlamaIndex", "llama_index.llms.openai_like")]
)
def test_examples_of_other_libraries_run_where_they_are_installed(
    section, package, namespace, url, model_id, served_model, capsys
):
    pytest.importorskip(package)
    capsys.readouterr()
    [code] = blocks(section, "python")
    exec(for_server(code, url, model_id), namespace)
    dimensions, _, answer = capsys.readouterr().out.partition("\n")
    assert dimensions.split()[0] == str(served_model.lvlm.config.get_text_config().hidden_size)
    assert answer.rstrip("\n") == served_model.generate(Path("cat.jpg"), "Describe the image.", 64).rstrip("\n")


def known_options() -> set[str]:
    """Return the options of `cafe serve`."""
    return {name for parameter in serve_command.params for name in parameter.opts}


def test_every_option_of_the_command_is_on_the_page_and_no_other():
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE[: PAGE.index("## Embeddings")]))
    assert named == known_options() - {"--help"}


def test_limits_on_the_page_are_those_of_the_server():
    limits, engine = RequestLimits(), EngineConfig()
    text = SECTIONS["Limits"]
    numbers = [limits.max_images, limits.max_request_images, limits.max_inputs, limits.max_input_tokens]
    numbers += [limits.max_new_tokens, limits.max_stop, limits.max_stop_characters]
    numbers += [int(limits.timeout), int(limits.body_timeout), engine.max_waiting]
    numbers += [MAX_FIELDS, int(DOWNLOAD_SECONDS)]
    assert [number for number in numbers if f"{number:,}" not in text] == []
    assert f"{limits.max_body_bytes >> 20} MiB" in text and f"{limits.max_image_bytes >> 20} MiB" in text
    assert f"{limits.max_image_pixels // 10**6} million" in text


def test_errors_on_the_page_are_those_that_the_source_gives():
    sources = "".join(file.read_text() for file in (ROOT / "src" / "cafe" / "serving").rglob("*.py"))
    in_source = set(re.findall(r'ApiError\(\s*(\d+),\s*"(\w+)"', sources))
    assert len(in_source) > 20
    listed = set()
    for status, text in re.findall(r"^\| (\d+) \| (.+) \|$", SECTIONS["Errors"], re.MULTILINE):
        listed |= {(status, code) for code in re.findall(r"`([a-z]\w+)`", text)}
    assert in_source <= listed


def test_metrics_on_the_page_are_those_of_the_server(http):
    exposed = http.get("/metrics").text
    named = re.findall(r"`(cafe_\w+)`", SECTIONS["Health and metrics"])
    assert len(named) > 12
    assert [name for name in named if not re.search(rf"^# TYPE {name} ", exposed, re.MULTILINE)] == []


def serve_options(command: str) -> list[str]:
    """Return the options with which a file starts `cafe serve`, after their values have been checked."""
    words = shlex.split(command)
    arguments = words[words.index("serve") + 1 :]
    with click.Context(serve_command) as context:
        serve_command.make_parser(context).parse_args(list(arguments))
    return [word for word in arguments if word.startswith("--")]


def test_systemd_unit_starts_the_server_with_options_that_exist():
    unit = (ROOT / "deploy" / "cafe.service").read_text()
    [command] = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert {"--model", "--api-key-file"} <= set(serve_options(command)) <= known_options()
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes", "CapabilityBoundingSet="):
        assert f"\n{line}\n" in unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    unit = (ROOT / "deploy" / "cafe.service").read_text()
    copy = tmp_path / "cafe.service"
    copy.write_text(unit.replace("/opt/cafe/bin/cafe", sys.executable))  # a program that exists
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_container_starts_the_server_as_a_user_without_rights():
    text = (ROOT / "deploy" / "Containerfile").read_text()
    words = [re.findall(rf"^{name} (\[.+\])$", text, re.MULTILINE)[-1] for name in ("ENTRYPOINT", "CMD")]
    command = " ".join(re.findall(r'"([^"]+)"', " ".join(words)))
    assert {"--host", "--model", "--api-key-file"} <= set(serve_options(command)) <= known_options()
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)
    # What is copied into the image exists.
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert [source for source in sources.split() if not (ROOT / source).exists()] == []


def test_health_check_of_the_container_tells_a_server_from_none(url):
    text = (ROOT / "deploy" / "Containerfile").read_text()
    [code] = re.findall(r'CMD \["python", "-c", "(.+)"\]', text)
    for address, status in ((url, 0), ("http://127.0.0.1:9", 1)):
        command = [sys.executable, "-c", code.replace(URL, address)]
        assert subprocess.run(command, stderr=subprocess.DEVNULL, env=dict(os.environ)).returncode == status
