"""Which jobs are read next: in order, within budgets, and so that no kind starves."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
import torch
from engine_samples import text_branch

from cafe.packing import Branch
from cafe.serving.config import EngineConfig
from cafe.serving.jobs import ChatJob, DeadlineError, EmbedJob, Job, OverloadedError, Sampling, ScoreJob
from cafe.serving.scheduler import MAX_PAUSE, PATIENCE, Budget, Scheduler

STEP = 1000  # tokens
SECONDS_PER_TOKEN = 1e-4  # of reading
SECONDS_PER_STEP = 0.01  # of decoding


def chat(length: int, max_tokens: int = 4, **options: float) -> ChatJob:
    sampling = Sampling(max_tokens=max_tokens)
    return ChatJob(branch=text_branch(length), sampling=sampling, on_piece=lambda piece: None, **options)


def embedding(length: int, **options: float) -> EmbedJob:
    return EmbedJob(branch=text_branch(length), **options)


def about_image(key: str, words: int, image: int = 100) -> EmbedJob:
    mask = torch.arange(image + words) < image
    branch = Branch(torch.zeros(image + words, dtype=torch.long), torch.zeros_like(mask), mask)
    return EmbedJob(branch=branch, image_key=key, prefix_length=image)


def make_scheduler(*jobs: Job, shares_images: bool = True, **config: int) -> Scheduler:
    made = Scheduler(EngineConfig(**{"step_tokens": STEP, **config}), shares_images)
    for job in jobs:
        made.add(job)
    return made


def num_tokens(jobs: list[Job]) -> int:
    return sum(len(job.branch) for job in jobs)


def test_jobs_of_a_kind_are_taken_in_their_order_and_within_the_budget():
    rng = Random(0)
    jobs = [embedding(rng.randint(1, STEP)) for _ in range(200)]
    scheduler = make_scheduler(*jobs)
    taken: list[Job] = []
    while len(scheduler):
        step = scheduler.take(0)
        assert 0 < num_tokens(step) <= STEP
        # Another one would not have fitted.
        assert not scheduler.others or num_tokens(step) + len(scheduler.others[0].branch) > STEP
        taken += step
    assert taken == jobs


def test_each_kind_gets_half_of_a_step_and_what_the_other_leaves():
    scheduler = make_scheduler(*(chat(100) for _ in range(50)), *(embedding(100) for _ in range(50)))
    for _ in range(4):
        step = scheduler.take(0)
        assert [sum(isinstance(job, kind) for job in step) for kind in (ChatJob, EmbedJob)] == [5, 5]
    few = make_scheduler(*(chat(100) for _ in range(50)), embedding(100))
    for number_of_chats in (9, 10):
        assert sum(isinstance(job, ChatJob) for job in few.take(0)) == number_of_chats
    few = make_scheduler(*(embedding(100) for _ in range(50)), chat(100))
    assert sum(isinstance(job, EmbedJob) for job in few.take(0)) == 9


def test_many_small_jobs_of_the_other_kind_take_no_chats_place():
    """Places are counted in chats, tokens in all."""
    scheduler = make_scheduler(*(embedding(1) for _ in range(40)), *(chat(100) for _ in range(8)), max_chats=8)
    assert len(scheduler.take(0)) == 48


@pytest.mark.parametrize("make", [chat, embedding])
def test_a_job_that_is_larger_than_a_step_is_read_alone(make):
    large = make(5 * STEP)
    scheduler = make_scheduler(make(10), large, make(10))
    first, second, third = (scheduler.take(0) for _ in range(3))
    assert len(first) == len(third) == 1
    assert second == [large]


def test_an_image_that_several_jobs_are_about_is_counted_once():
    jobs = [about_image("a", 10) for _ in range(90)]
    assert len(make_scheduler(*jobs).take(0)) == 90  # 100 + 90 * 10 tokens
    assert len(make_scheduler(*jobs, about_image("b", 10)).take(0)) == 90
    # A model that cannot share reads it for each.
    assert len(make_scheduler(*jobs, shares_images=False).take(0)) == 9
    # And texts have no image in common.
    assert len(make_scheduler(*(about_image("", 10) for _ in range(20))).take(0)) == 9


def test_a_budget_counts_what_others_do_not_read_already():
    budget = Budget(300, shares_images=True)
    budget.spend(about_image("a", 10))
    assert (budget.remaining, budget.cost(about_image("a", 7)), budget.cost(about_image("b", 7))) == (190, 7, 107)


def simulate(scheduler: Scheduler, arrive: Callable[[int, int], list[Job]], num_steps: int) -> dict[Job, int]:
    """Run steps as an engine does, by a clock of its own, and return the step in which each job was taken.

    `arrive` returns the jobs that arrive before a step, by its number and the number of waiting jobs.
    """
    running: list[list[int]] = []  # for each chat, the tokens that are left
    taken: dict[Job, int] = {}
    for step in range(num_steps):
        for job in arrive(step, len(scheduler)):
            scheduler.add(job)
        jobs = scheduler.take(len(running))
        if jobs:
            taken.update(dict.fromkeys(jobs, step))
            scheduler.observe_reading(jobs, num_tokens(jobs) * SECONDS_PER_TOKEN)
            running += [[job.sampling.max_tokens - 1] for job in jobs if isinstance(job, ChatJob)]
        running = [left for left in running if left[0] > 0]
        if running:
            scheduler.observe_decoding(SECONDS_PER_STEP)
            for left in running:
                left[0] -= 1
        assert len(running) <= scheduler.config.max_chats
    return taken


# Floods of one kind: short jobs, jobs larger than half of a step, and jobs larger than a step.
@pytest.mark.parametrize("flood_length", [100, 600, 3000])
@pytest.mark.parametrize("length", [10, 700, 3000])
@pytest.mark.parametrize("max_tokens", [1, 50])
@pytest.mark.parametrize("kinds", [(chat, embedding), (embedding, chat)], ids=["flood of chats", "flood of embeddings"])
def test_no_kind_of_job_starves_under_a_flood_of_the_other(kinds, max_tokens, length, flood_length):
    flood_kind, other_kind = kinds
    options = {chat: {"max_tokens": max_tokens}, embedding: {}}
    others = [other_kind(length, **options[other_kind]) for _ in range(6)]

    def arrive(step: int, waiting: int) -> list[Job]:
        """Keep the queue full of one kind, with one of the others from time to time."""
        flood = [flood_kind(flood_length, **options[flood_kind]) for _ in range(12 - waiting)]
        return [*flood, others[step // 100]] if step % 100 == 50 else flood

    scheduler = make_scheduler(max_chats=4)
    taken = simulate(scheduler, arrive, 100 * len(others))
    waited = [taken[job] - (100 * number + 50) for number, job in enumerate(others)]
    # For as long as the chats that run need for their share, or for a place; twice, where it is the other's turn.
    patience = 2 * max(PATIENCE, max_tokens) if max_tokens > 1 or flood_kind is chat else 2
    assert max(waited) <= patience + 2
    # The flood goes on, too.
    assert sum(isinstance(job, ChatJob) == (flood_kind is chat) for job in taken) > 20


def test_running_chats_have_their_share_between_two_readings():
    scheduler = make_scheduler(max_chats=4)
    taken = simulate(scheduler, lambda step, waiting: [chat(100, 500)] * (step == 0) + [embedding(100)], 1000)
    steps = sorted(set(taken.values()) - {0})
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    assert len(steps) > 30
    # By its tokens, or by the time that they took.
    assert min(gaps[:20]) >= min(PATIENCE, 0.2 / SECONDS_PER_STEP)


def test_a_pause_of_running_chats_is_kept_short_where_reading_is_slow():
    scheduler = make_scheduler(*(embedding(100) for _ in range(20)))
    scheduler.observe_reading([embedding(100)], seconds=100 * 2e-3)
    for _ in range(PATIENCE):
        scheduler.observe_decoding(SECONDS_PER_STEP)
    assert num_tokens(scheduler.take(num_chats=1)) == MAX_PAUSE / 2e-3
    assert num_tokens(scheduler.take(num_chats=0)) == STEP


def test_reading_and_decoding_each_get_half_of_the_time_where_a_job_is_slow():
    scheduler = make_scheduler(embedding(100), embedding(100))
    scheduler.observe_reading([embedding(5000)], seconds=10.0)
    waited = 0
    while not scheduler.take(num_chats=1):
        scheduler.observe_decoding(0.1)
        waited += 1
    assert waited == pytest.approx(50, abs=1)


def test_chats_beyond_the_limit_wait_while_embeddings_pass():
    scheduler = make_scheduler(*(chat(10) for _ in range(5)), max_chats=3)
    assert len(scheduler.take(0)) == 3
    scheduler.add(embedding(10))
    score = ScoreJob(branch=text_branch(10), token_ids=(1,))
    scheduler.add(score)
    for _ in range(PATIENCE):
        scheduler.observe_decoding(SECONDS_PER_STEP)
    passed = scheduler.take(num_chats=3)
    assert [type(job) for job in passed] == [EmbedJob, ScoreJob]
    for _ in range(PATIENCE):
        scheduler.observe_decoding(SECONDS_PER_STEP)
    assert len(scheduler.take(num_chats=2)) == 1
    assert len(scheduler.take(num_chats=0)) == 1
    assert scheduler.take(num_chats=1) == []


def test_more_jobs_than_may_wait_are_refused_with_a_time_to_come_back():
    scheduler = make_scheduler(chat(10), embedding(10), embedding(10), max_waiting=3)
    scheduler.observe_reading([embedding(100), embedding(100)], seconds=3.0)
    for job in (chat(10), embedding(10)):
        with pytest.raises(OverloadedError) as error:
            scheduler.add(job)
        assert error.value.retry_after == pytest.approx(4.5)
    assert len(scheduler) == 3
    assert len(scheduler.take(0)) == 3
    scheduler.add(chat(10))


def test_jobs_that_are_over_leave_the_queues():
    jobs = [chat(10), embedding(10), chat(10, timeout=1.0), embedding(10, timeout=1.0), chat(10), embedding(10)]
    scheduler = make_scheduler(*jobs)
    jobs[0].future.cancel()
    jobs[1].future.cancel()
    late_at = jobs[3].created + 1.5
    scheduler.drop_over(late_at)
    assert scheduler.take(0) == jobs[4:]
    for late in jobs[2:4]:
        assert isinstance(late.future.exception(timeout=0), DeadlineError)
    assert not any(job.future.done() for job in jobs[4:])


def test_running_chats_together_fit_into_their_memory_each_as_long_as_the_longest():
    short, long, other = chat(90, max_tokens=10), chat(190, max_tokens=10), chat(90, max_tokens=10)
    scheduler = make_scheduler(short, long, other, max_chat_tokens=400)
    # Two chats take twice the room of the longer one; a third would take three times that.
    assert scheduler.take(0) == [short, long]
    scheduler = make_scheduler(short, long, other, embedding(5), max_chat_tokens=399)
    first = scheduler.take(0)
    assert [job for job in first if isinstance(job, ChatJob)] == [short]
    assert len(first) == 2  # embeddings take no place
    # What runs counts too, and in its order: the one behind the long chat waits as well.
    decode_until(scheduler, lambda: scheduler.take(1, short.max_length) or not scheduler.chats, steps=2 * PATIENCE)
    assert list(scheduler.chats) == [long, other]
    # A chat that is too long for it runs alone.
    alone = make_scheduler(chat(1000), max_chat_tokens=10)
    assert len(alone.take(0)) == 1


def decode_until(scheduler: Scheduler, stop: Callable[[], object], steps: int) -> None:
    for _ in range(steps):
        scheduler.observe_decoding(SECONDS_PER_STEP)
        if stop():
            return
