"""Images that are read in other processes: the same tensors, and whatever ends a process fails alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import families
import pytest
import torch
import worker_jobs
from collection_samples import write_pdf
from model_samples import WIDE, make, noise_image
from samples import png

from cafe.content import ImageLimits, ImageRef
from cafe.errors import RecordError
from cafe.lvlm.images import ProcessedImages
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.jobs import NotReadyError, OverloadedError
from cafe.serving.worker_process import WorkerDiedError, WorkerProcess

DIED = "The image ended the process that read it."


@pytest.fixture(scope="module")
def chat_processor():
    return families.qwen2_vl().chat_processor


@pytest.fixture(scope="module")
def shared(chat_processor):
    """Two processes, for tests that leave them as they were."""
    workers = ImageWorkers(chat_processor, num_workers=2)
    yield workers
    workers.close()


@pytest.fixture
def workers(chat_processor):
    """A process that is ended by the test."""
    workers = ImageWorkers(chat_processor, timeout=60)
    workers.call(worker_jobs.process_id)  # it is there
    yield workers
    workers.close()


def assert_same(processed: ProcessedImages, expected: ProcessedImages) -> None:
    assert processed.token_runs == expected.token_runs
    assert processed.inputs.keys() == expected.inputs.keys()
    for name, tensor in expected.inputs.items():
        assert torch.equal(processed.inputs[name], tensor) and processed.inputs[name].dtype == tensor.dtype


def assert_good(workers: ImageWorkers) -> None:
    """Read an image that the cache does not have."""
    ref = ImageRef(png("green", (40, 30 + os.urandom(1)[0])))
    assert_same(workers.load([ref]), workers.chat_processor.images.load([ref]))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "idefics3", "gemma3", "paligemma"])
def test_every_family_is_read_as_in_this_process(family, tmp_path):
    images = make(family).chat_processor
    workers = ImageWorkers(images)
    try:
        path = tmp_path / "image.png"
        noise_image(4, 40, 56).save(path)
        refs = [ImageRef(png("red", (64, 48), "JPEG")), ImageRef(path)]
        for each in ([refs[0]], [refs[1]], refs):
            assert_same(workers.load(each), images.images.load(each))
        assert_same(workers.process([WIDE]), images.images.process([WIDE]))
        [decoded] = workers.decode(refs[:1])
        assert decoded.tobytes() == images.images.decode(refs[:1])[0].tobytes()
    finally:
        workers.close()


def test_a_chat_processor_encodes_with_them_as_with_its_own(shared, chat_processor):
    refs = [ImageRef(png("red", (64, 48)))]
    other = chat_processor.with_images(shared)
    assert_same(other.load_images(refs), chat_processor.load_images(refs))
    assert_same(other.load_images([]), chat_processor.load_images([]))
    assert other.decode_images([]) == [] and shared.process([]).inputs == {}


def test_the_same_bytes_give_the_same_object_and_other_limits_another(shared):
    red = png("red", (20, 30))
    first = shared.load([ImageRef(red)])
    assert shared.load([ImageRef(bytes(bytearray(red)), name="of another request")]) is first
    assert shared.load([ImageRef(red), ImageRef(red)]) is not first
    assert shared.load([ImageRef(red, ImageLimits(max_pixels=1000))]) is not first
    with pytest.raises(RecordError, match="over the limit of 100"):
        shared.load([ImageRef(red, ImageLimits(max_pixels=100))])


def test_lookups_and_reads_are_counted(chat_processor):
    workers = ImageWorkers(chat_processor, num_workers=0)
    value = workers.metrics.registry.get_sample_value
    for color in ("red", "blue", "red"):
        workers.load([ImageRef(png(color))])
    assert value("cafe_cache_hits_total", {"cache": "images", "hit": "false"}) == 2
    assert value("cafe_cache_hits_total", {"cache": "images", "hit": "true"}) == 1
    assert value("cafe_image_seconds_count") == 2


def test_threads_that_want_one_image_share_what_is_read(shared):
    barrier, data = threading.Barrier(16), png("purple", (50, 60))
    before = shared.metrics.registry.get_sample_value("cafe_image_seconds_count")

    def load(_: int) -> ProcessedImages:
        barrier.wait()
        return shared.load([ImageRef(data)])

    with ThreadPoolExecutor(16) as pool:
        processed = list(pool.map(load, range(16)))
    assert all(each is processed[0] for each in processed)
    assert shared.metrics.registry.get_sample_value("cafe_image_seconds_count") == before + 1


def test_sixteen_threads_get_what_is_theirs(shared, chat_processor):
    refs = [[ImageRef(png("red", (16 + number, 64)))] for number in range(48)]
    expected = [chat_processor.images.load(each) for each in refs]
    with ThreadPoolExecutor(16) as pool:
        for processed, each in zip(pool.map(shared.load, refs), expected, strict=True):
            assert_same(processed, each)


@pytest.mark.parametrize("job", [(worker_jobs.kill,), (worker_jobs.end, 0), (worker_jobs.end, 3)])
def test_a_job_that_ends_its_process_fails_alone(workers, job):
    before = workers.call(worker_jobs.process_id)
    with pytest.raises(RecordError, match=DIED):
        workers.call(*job)
    assert_good(workers)
    assert workers.call(worker_jobs.process_id) != before
    assert workers.num_alive == 1 and workers.is_alive
    assert workers.metrics.registry.get_sample_value("cafe_image_worker_restarts_total") == 1


def test_jobs_beside_and_behind_one_that_dies_succeed(shared):
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(shared.call, worker_jobs.echo, number) for number in range(20)]
        poison = [pool.submit(shared.call, worker_jobs.kill) for _ in range(3)]
        futures += [pool.submit(shared.call, worker_jobs.echo, number) for number in range(20, 40)]
        assert [future.result() for future in futures] == list(range(40))
        for future in poison:
            with pytest.raises(RecordError, match=DIED):
                future.result()
    assert_good(shared)


def test_a_job_that_never_ends_is_ended(chat_processor):
    workers = ImageWorkers(chat_processor, timeout=2)
    try:
        with pytest.raises(RecordError, match="takes too long"):
            workers.call(worker_jobs.spin)
        assert_good(workers)
    finally:
        workers.close()


def test_a_process_that_is_stopped_is_ended(chat_processor, monkeypatch):
    monkeypatch.setattr("cafe.serving.worker_process.GRACE_SECONDS", 0.1)
    workers = ImageWorkers(chat_processor, timeout=2)
    try:
        os.kill(workers.call(worker_jobs.process_id), signal.SIGSTOP)
        with pytest.raises(RecordError, match="takes too long"):
            workers.call(worker_jobs.echo, 1)
        assert_good(workers)
    finally:
        workers.close()


def test_an_idle_process_that_dies_is_replaced_and_no_job_is_blamed(workers):
    before = workers.call(worker_jobs.process_id)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{before}"))
    assert workers.call(worker_jobs.process_id) != before
    os.kill(workers.call(worker_jobs.process_id), signal.SIGKILL)
    wait_until(lambda: workers.metrics.registry.get_sample_value("cafe_image_worker_restarts_total") == 2)
    wait_until(lambda: workers.is_alive)


def test_the_process_that_takes_the_place_of_a_dead_one_was_ready_before(workers):
    spares = workers._supply._spare
    for _ in range(2):
        wait_until(lambda: not spares.empty())
        spare = spares.queue[0]._process.pid
        with pytest.raises(RecordError, match=DIED):
            workers.call(worker_jobs.kill)
        assert workers.call(worker_jobs.process_id) == spare
    # One that has died meanwhile is of no use.
    wait_until(lambda: not spares.empty())
    os.kill(spares.queue[0]._process.pid, signal.SIGKILL)
    wait_until(lambda: not spares.queue[0].is_alive)
    with pytest.raises(RecordError, match=DIED):
        workers.call(worker_jobs.kill)
    assert_good(workers)


def test_a_job_that_cannot_be_handed_over_fails_alone(workers, monkeypatch):
    def fail(worker: WorkerProcess, job: object) -> None:
        raise OSError

    with monkeypatch.context() as context:
        context.setattr(WorkerProcess, "ask", fail)
        with pytest.raises(RecordError):
            workers.call(worker_jobs.echo, 1)
    assert workers.call(worker_jobs.echo, 2) == 2
    assert workers.seconds_down == 0


def test_jobs_are_refused_while_no_process_can_be_started(workers, monkeypatch):
    def fail(worker: WorkerProcess) -> None:
        raise WorkerDiedError

    with monkeypatch.context() as context:
        context.setattr(WorkerProcess, "start", fail)
        workers.timeout = 0.1  # that a job may wait
        # One process works, one is ready, and one may be about to be.
        with pytest.raises(OverloadedError):
            for _ in range(4):
                with suppress(RecordError):
                    workers.call(worker_jobs.kill)
        assert not workers.is_alive
        workers.timeout = 60
    assert_good(workers)


def test_memory_is_limited(workers):
    before = workers.call(worker_jobs.process_id)
    with pytest.raises(RecordError, match="more memory than one image may take"):
        workers.call(worker_jobs.eat)
    assert workers.call(worker_jobs.process_id) == before
    assert_good(workers)


def test_bad_images_say_what_is_wrong_and_faults_do_not(shared, caplog):
    for data in (b"", b"no image", png("red", (64, 64), "JPEG")[:400]):
        with pytest.raises(RecordError):
            shared.load([ImageRef(data)])
    with pytest.raises(RecordError, match="16 x 16"):
        shared.call(worker_jobs.refuse)
    assert not caplog.records
    with pytest.raises(RecordError) as error:
        shared.call(worker_jobs.fail)
    assert str(error.value) == "The image cannot be read."
    assert "KeyError: 'a secret'" in caplog.text
    with pytest.raises(RecordError, match="cannot be read"):
        shared.call(worker_jobs.give_lambda)


def test_a_page_of_a_collection_is_rendered_by_the_worker_itself(shared, tmp_path):
    path = str(write_pdf(tmp_path / "a.pdf", ["one"]))
    assert max(shared.call(worker_jobs.size_of_page, path, 1)) == 1600
    with pytest.raises(RecordError, match=r"Page 2 of .* cannot be read"):
        shared.call(worker_jobs.size_of_page, path, 2)


def test_only_so_many_jobs_wait(chat_processor, tmp_path):
    workers = ImageWorkers(chat_processor, max_waiting=2, timeout=60)
    begun, done = tmp_path / "begun", tmp_path / "done"
    try:
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(workers.call, worker_jobs.wait_for, begun, done)
            wait_until(begun.exists)
            waiting = [pool.submit(workers.call, worker_jobs.echo, number) for number in range(2)]
            wait_until(lambda: workers.num_waiting == 2)
            with pytest.raises(OverloadedError) as error:
                workers.call(worker_jobs.echo, 2)
            assert error.value.retry_after > 0
            done.touch()
            assert [future.result() for future in (running, *waiting)] == [None, 0, 1]
    finally:
        done.touch()
        workers.close()


def test_a_job_that_waited_too_long_is_refused(workers, tmp_path):
    begun, done = tmp_path / "begun", tmp_path / "done"
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(workers.call, worker_jobs.wait_for, begun, done)
        wait_until(begun.exists)
        late = pool.submit(workers.call, worker_jobs.echo, 1)
        wait_until(lambda: workers.num_waiting == 1)
        workers.timeout = 0  # for those that wait
        done.touch()
        assert slow.result() is None
        with pytest.raises(OverloadedError):
            late.result()


def test_a_reply_that_cannot_be_read_fails_its_job_alone(workers):
    with pytest.raises(RecordError, match=DIED):
        workers.call(worker_jobs.give_trap)
    assert_good(workers)


def test_closing_ends_the_processes_and_whatever_waits(chat_processor, tmp_path):
    before = set(multiprocessing.active_children())
    workers = ImageWorkers(chat_processor, num_workers=2, timeout=60)
    ids = [workers.call(worker_jobs.process_id) for _ in range(8)]
    begun, never = tmp_path / "begun", tmp_path / "never"
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(workers.call, worker_jobs.wait_for, begun, never) for _ in range(4)]
        wait_until(lambda: begun.exists() and workers.num_waiting == 2)
        workers.close()
        for future in futures:
            with pytest.raises(NotReadyError):
                future.result()
    with pytest.raises(NotReadyError):
        workers.call(worker_jobs.echo, 1)
    assert not workers.is_alive and not any(Path(f"/proc/{each}").exists() for each in ids)
    assert set(multiprocessing.active_children()) <= before
    assert not [thread for thread in workers._threads if thread.is_alive()]
    workers.close()  # twice does no harm


def test_without_workers_this_process_reads(chat_processor):
    workers = ImageWorkers(chat_processor, num_workers=0)
    assert workers.is_alive and workers.call(worker_jobs.process_id) == os.getpid()
    assert_good(workers)
    with pytest.raises(RecordError, match="cannot be read"):
        workers.call(worker_jobs.fail)
    workers.close()


SCRIPT = """
import sys
import families, worker_jobs
from samples import png
from cafe.content import ImageRef
from cafe.serving.image_workers import ImageWorkers

print("started")
workers = ImageWorkers(families.qwen2_vl().chat_processor, num_workers=2)
print(len(workers.load([ImageRef(png("red"))]).token_runs), workers.call(worker_jobs.process_id), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["1 / 0", "import os; os._exit(0)"])
def test_a_plain_script_runs_once_and_leaves_no_process(tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # The pipes of the script are held by whatever it leaves, and read until nobody holds them.
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    [started, result] = ran.stdout.splitlines()
    assert started == "started" and ran.stderr.count("Traceback") == ("1 / 0" in end), ran.stderr
    count, process = result.split()
    assert count == "1"
    wait_until(lambda: not Path(f"/proc/{process}").exists())


def wait_until(condition) -> None:
    """Wait for something that other threads or processes do."""
    event = threading.Event()
    for _ in range(3000):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("It did not happen.")
