"""A server from its beginning to its end: in this process and as a command."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import pytest
from http_samples import Http, RecordingEngine, blocked, connect, error_of, post_head, user

from cafe.checkpoint import resolve_checkpoint
from cafe.cli.main import main
from cafe.cli.serve import KEY_VARIABLE
from cafe.errors import CafeError
from cafe.model import Cafe
from cafe.serving import server as server_module
from cafe.serving.config import EngineConfig, ServingConfig
from cafe.serving.engine import Engine
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.routes import operations
from cafe.serving.server import Server, bind, check_config, loaded_services, model_id_of, url_of


@contextmanager
def full(services) -> Iterator[Engine]:
    """An engine of the same model with room for two jobs."""
    engine = Engine(services.model, EngineConfig(max_waiting=2))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def test_a_full_queue_gets_429_and_takes_none_of_a_request(services, serve):
    with full(services) as own:
        engine = RecordingEngine(own)
        server = serve(engine=engine)
        with blocked(own):
            response = server.embed(["a", "b", "c"])
            assert error_of(response) == (429, "overloaded") and int(response.headers["Retry-After"]) >= 1
            assert len(engine.jobs) == 2 and all(job.future.cancelled() for job in engine.jobs)
            stream = server.chat(user("a"), stream=True)
            assert error_of(stream) == (429, "overloaded")
        assert server.embed("a").ok


def test_a_request_that_is_not_done_in_time_gets_504(services, serve):
    server = serve(timeout=0.1)
    with blocked(services.engine):
        assert error_of(server.embed("a")) == (504, "deadline_exceeded")
        assert error_of(server.chat(user("a"))) == (504, "deadline_exceeded")
        events = server.chat(user("a"), stream=True).text.split("\n\n")
    assert '"deadline_exceeded"' in events[-2] and "[DONE]" not in "".join(events)


def test_health_says_when_the_engine_has_ended(services, serve):
    engine = Engine(services.model)
    engine.start()
    server = serve(engine=engine)
    assert server.get("/health").json()["status"] == "ok" and server.get("/ready").ok
    engine.stop()
    assert server.get("/health").status_code == 503 and server.get("/health").json()["status"] == "error"
    assert error_of(server.get("/ready")) == (503, "not_ready")
    assert error_of(server.embed("a")) == (503, "not_ready")


def test_health_says_when_no_image_worker_is_left(services, serve, monkeypatch):
    monkeypatch.setattr(operations, "MAX_IMAGES_DOWN", 0.0)
    images = ImageWorkers(services.encoder.chat_processor, num_workers=1)
    server = serve(images=images)
    while not (answer := server.get("/health").json())["image_workers"]:
        pass
    assert answer["status"] == "ok"
    images.close()
    while (response := server.get("/health")).ok:
        pass
    assert response.status_code == 503
    assert response.json()["status"] == "error" and response.json()["image_workers"] == 0


def test_health_says_when_the_engine_hangs(http, services, monkeypatch):
    monkeypatch.setattr(operations, "MAX_HEARTBEAT_AGE", 2.0)  # more than it waits for work
    assert http.get("/health").ok
    with blocked(services.engine):
        while http.get("/health").ok:
            pass
        assert http.get("/health").json()["heartbeat_age"] > 2
    while not http.get("/health").ok:
        pass
    assert http.embed("a").ok


def test_health_says_when_no_image_can_be_read(services, served_model, serve, monkeypatch):
    images = ImageWorkers(served_model.chat_processor)
    try:
        server = serve(images=images)
        while not images.is_alive:
            pass
        assert server.get("/health").json()["image_workers"] == 1
    finally:
        images.close()
    assert server.get("/health").ok  # another may take its place
    monkeypatch.setattr(operations, "MAX_IMAGES_DOWN", 0.0)
    assert server.get("/health").status_code == 503
    assert server.get("/health").json()["image_workers"] == 0


def test_the_model_is_listed_by_its_name_and_never_by_its_path(http, model_id, random_base):
    answer = http.get("/v1/models").json()
    assert [each["id"] for each in answer["data"]] == [model_id] == [random_base.name]
    assert str(random_base.parent) not in http.get("/v1/models").text
    assert http.get(f"/v1/models/{model_id}").json()["object"] == "model"
    assert error_of(http.get("/v1/models/other")) == (404, "model_not_found")


def test_model_ids(served_model, tmp_path):
    (tmp_path / "mine" / "checkpoint").mkdir(parents=True)
    names = {str(tmp_path / "mine" / "checkpoint"): "mine", "owner/name": "owner/name", "": "cafe"}
    names[resolve_checkpoint("scenes")] = "scenes"
    assert {name: model_id_of(replace(served_model, name=name)) for name in names} == names


def test_metrics_count_requests_by_route(http):
    http.embed("a")
    http.get("/secret/path")
    text = http.get("/metrics").text
    assert 'cafe_requests_total{route="/v1/embeddings",status="200"}' in text
    assert 'cafe_requests_total{route="other",status="404"}' in text and "secret" not in text


def test_the_schema_documents_errors_and_loads_nothing_from_elsewhere(http):
    schema = http.get("/openapi.json").json()
    for path in ("/v1/embeddings", "/v1/chat/completions", "/v1/rerank", "/v1/score"):
        assert {"200", "400", "401", "413", "415", "422", "429", "500", "503", "504"} <= set(
            schema["paths"][path]["post"]["responses"]
        )
    assert "securitySchemes" not in schema["components"]
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404


def test_the_schema_says_that_a_key_is_needed(serve):
    server = serve(api_key="key")
    schema = server.get("/openapi.json", headers={"Authorization": "Bearer key"}).json()
    [(name, scheme)] = schema["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path in ("/v1/embeddings", "/v1/chat/completions", "/v1/rerank", "/search", "/ask"):
        assert schema["paths"][path]["post"]["security"] == [{name: []}]
    assert not any("security" in schema["paths"][path]["get"] for path in ("/health", "/ready"))
    assert "security" in schema["paths"]["/metrics"]["get"]


def test_what_was_taken_is_finished_before_the_end(services):
    listening, engine = bind("127.0.0.1", 0), RecordingEngine(services.engine)
    server, http = Server(replace(services, engine=engine)), Http(url_of(listening))
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    server.ready.wait()
    answers = []
    with blocked(services.engine):
        asking = Thread(target=lambda: answers.append(http.embed("a")))
        asking.start()
        while not engine.jobs:
            pass
        server.stop()
        assert error_of(http.embed("b")) == (503, "not_ready")
        assert error_of(http.get("/ready")) == (503, "not_ready") and http.get("/health").ok
        assert thread.is_alive()
    asking.join()
    thread.join()
    assert answers[0].ok
    with pytest.raises(OSError):
        http.get("/health")


def test_a_request_that_does_not_end_is_given_up_at_the_end(services, monkeypatch):
    monkeypatch.setattr(server_module, "SEND_SECONDS", 0)
    listening, engine = bind("127.0.0.1", 0), RecordingEngine(services.engine)
    server = Server(replace(services, engine=engine))
    server._patience = 0.0
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    server.ready.wait()
    body = b'{"input": "a"}'
    with blocked(services.engine), connect(url_of(listening)) as connection:
        connection.sendall(post_head(len(body)) + body)
        while not engine.jobs:
            pass
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
    assert engine.jobs[0].future.cancelled()


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6")
def test_an_ipv6_address_has_brackets():
    try:
        listening = bind("::1", 0)
    except CafeError:
        pytest.skip("there is no IPv6 loopback")
    with listening:
        assert re.fullmatch(r"http://\[::1\]:\d+", url_of(listening))


def test_an_address_that_is_taken_is_said_in_a_sentence():
    with bind("127.0.0.1", 0) as listening, pytest.raises(CafeError, match=r"cannot listen on 127\.0\.0\.1, port"):
        bind("127.0.0.1", listening.getsockname()[1])
    with pytest.raises(CafeError, match="There is no address"):
        bind("no.such.host.invalid", 0)


def test_another_address_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com"):
        with pytest.raises(CafeError, match="api-key-file"):
            check_config(ServingConfig(host=host))
        check_config(ServingConfig(host=host, api_key="key"))
    check_config(ServingConfig())


def test_there_has_to_be_something_to_serve():
    with pytest.raises(CafeError, match="nothing to serve"), loaded_services(ServingConfig(), None, None):
        pass


def start(*options, **environment):
    """Start the command, and return its process and the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cafe", "serve", "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    line = process.stdout.readline()
    assert re.fullmatch(r"Serving on http://127\.0\.0\.1:\d+\n", line)
    return process, Http(line.split()[-1])


def test_the_command_serves_until_a_signal(random_base, served_model):
    process, http = start("--model", str(random_base), "--max-new-tokens", "7", CAFE_API_KEY="secret-key")
    try:
        assert error_of(http.embed("a")) == (401, "invalid_api_key")
        key = {"Authorization": "Bearer secret-key"}
        assert http.post("/v1/embeddings", {"input": "a"}, headers=key).ok
        body = {"messages": [user("a")], "max_tokens": 8}
        assert error_of(http.post("/v1/chat/completions", body, headers=key)) == (400, "invalid_value")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0", "--model", "scenes"], "could use the server"),
        ([], "There is nothing to serve"),
        (["--model", "/no/such/model"], "does not exist"),
        (["--collection", "/no/such/collection"], "There is no collection"),
        (["--model", "scenes", "--api-key-file", "/no/such/file"], "cannot be used"),
    ],
)
def test_mistakes_are_said_in_a_line(monkeypatch, capsys, options, message):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["serve", "--port", "0", *options]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("cafe: ")


@pytest.mark.parametrize("key", ["", "  \n", "two words", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused(tmp_path, capsys, key):
    file = tmp_path / "key"
    file.write_text(key)
    assert main(["serve", "--port", "0", "--model", "scenes", "--api-key-file", str(file)]) == 1
    assert "key" in capsys.readouterr().err.lower()


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "scenes"]) == 1
    assert "pip install 'cafe-lvlm[serve]'" in capsys.readouterr().err


def test_a_collection_brings_its_model(collection_of_scenes, serve_collection):
    with serve_collection(collection_of_scenes) as services:
        assert services.collection is not None and services.collection.model is services.model


@pytest.fixture
def collection_of_scenes(tmp_path, random_base, scenes):
    """The directory of a small collection."""
    from search_samples import index

    folder = tmp_path / "photos"
    folder.mkdir()
    for file in sorted((scenes / "images" / "test").glob("*.png"))[:3]:
        (folder / file.name).write_bytes(file.read_bytes())
    return index(tmp_path / "collection", random_base, folder).directory


@pytest.fixture
def serve_collection():
    """A function that loads a collection as the command does."""
    return lambda directory: loaded_services(ServingConfig(), None, str(directory))


def test_a_model_that_did_not_make_the_collection_is_refused(collection_of_scenes, tmp_path, random_base):
    other = Cafe.load(random_base)
    for parameter in other.lvlm.parameters():
        parameter.data = parameter.data.flip(0)
    other.save(tmp_path / "other")
    with (
        pytest.raises(CafeError, match="other embeddings"),
        loaded_services(ServingConfig(), str(tmp_path / "other"), str(collection_of_scenes)),
    ):
        pass


def test_a_second_signal_ends_the_command_at_once(random_base):
    process, http = start("--model", str(random_base))
    try:
        with connect(http.url) as connection:
            connection.sendall(post_head(100) + b"{")  # a request that the server waits for
            assert all(http.get("/ready").ok for _ in range(2))  # which come after it
            process.send_signal(signal.SIGTERM)
            while http.get("/ready").ok:
                pass
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
