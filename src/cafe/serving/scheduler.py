"""Which waiting jobs are read next: within a token budget, in order, and so that no kind of job starves another.

A step reads waiting jobs in one pass, and then decodes one token of every running chat. Two rules share the model:

- New chats and other jobs each get half of a step's tokens where both wait; what one leaves, the other takes.
- While chats run, jobs are collected and then read together, at most about once in `PATIENCE` tokens. A reader of an
  answer notices one longer pause in that many tokens, and not one at each; and jobs that are read together cost less.
"""

from collections import deque
from dataclasses import dataclass

from cafe.serving.config import EngineConfig
from cafe.serving.jobs import ChatJob, DeadlineError, Job, OverloadedError

PATIENCE = 24  # tokens of each running chat between two readings: more than 20, so that 95 in 100 come without a pause
MAX_WAIT = 0.2  # seconds of decoding that jobs wait for at most, where decoding is slow
MAX_PAUSE = 0.4  # seconds that reading may hold up running chats, as far as it can be foreseen
NO_LIMIT = 2**40  # tokens
SMOOTHING = 0.2  # of the measured rates: the weight of the last value


class Budget:
    """Count the tokens of jobs that are read together; of those about the same images, the images once.

    Args:
        num_tokens: the most tokens.
        shares_images: whether the model reads the same images once.

    Attributes:
        remaining: tokens; negative if a job was larger than what there was.
    """

    def __init__(self, num_tokens: int, shares_images: bool) -> None:
        self.remaining, self.shares_images = num_tokens, shares_images
        self._images: set[str] = set()

    def cost(self, job: Job) -> int:
        """Return the tokens of a job that the others do not read already."""
        if job.image_key in self._images:
            return len(job.branch) - int(job.branch.image_mask.sum())
        return len(job.branch)

    def spend(self, job: Job) -> None:
        """Add a job."""
        self.remaining -= self.cost(job)
        if job.image_key and self.shares_images:
            self._images.add(job.image_key)


@dataclass
class Places:
    """Count the chats that run, and the memory for them: each takes as much of the cache as the longest.

    Attributes:
        max_chats: the most chats.
        max_tokens: of all chats together; a chat that is longer by itself runs alone.
        num_chats: that run.
        longest: tokens of the longest of them, with the whole of its answer.
    """

    max_chats: int
    max_tokens: int
    num_chats: int
    longest: int

    def allow(self, job: Job) -> bool:
        """Return whether a job may run too; what is no chat takes no place."""
        if not isinstance(job, ChatJob):
            return True
        if self.num_chats >= self.max_chats:
            return False
        fits = (self.num_chats + 1) * max(self.longest, job.max_length) <= self.max_tokens
        return fits or not self.num_chats

    def add(self, job: Job) -> None:
        """Add a job."""
        if isinstance(job, ChatJob):
            self.num_chats += 1
            self.longest = max(self.longest, job.max_length)


class Scheduler:
    """Hold the jobs that wait, and choose those that are read in the next step.

    It is not safe for threads; the engine holds a lock.

    Args:
        config: limits.
        shares_images: whether the model reads the same images of several jobs once.
    """

    def __init__(self, config: EngineConfig, shares_images: bool = True) -> None:
        self.config, self.shares_images = config, shares_images
        self.chats: deque[Job] = deque()
        self.others: deque[Job] = deque()
        self._chats_first = True
        # Since jobs were read last.
        self._num_decoded = 0
        self._decoding_seconds = 0.0
        # Of reading jobs.
        self._reading_seconds = 0.0
        self._tokens_per_second = 0.0
        self._seconds_per_job = 0.0

    def __len__(self) -> int:
        """Return the number of waiting jobs."""
        return len(self.chats) + len(self.others)

    def add(self, job: Job) -> None:
        """Take a job.

        Raises:
            OverloadedError: too many wait.
        """
        if len(self) >= self.config.max_waiting:
            raise OverloadedError(retry_after=self._seconds_per_job * len(self))
        (self.chats if isinstance(job, ChatJob) else self.others).append(job)

    def take(self, num_chats: int, longest_chat: int = 0) -> list[Job]:
        """Take the jobs that are read in this step: none while the chats that run have not had their share.

        Args:
            num_chats: the number of chats that run.
            longest_chat: the tokens of the longest of them, with the whole of its answer.
        """
        if num_chats and not self._may_interrupt():
            return []
        num_tokens = self._step_tokens(num_chats)
        budget = Budget(num_tokens, self.shares_images)
        places = Places(self.config.max_chats, self.config.max_chat_tokens or NO_LIMIT, num_chats, longest_chat)
        first, second = self.chats, self.others
        # A job that is larger than what is left is read in a step that begins with it, so each kind begins in turn.
        if not self._chats_first:
            first, second = second, first
        self._chats_first = not self._chats_first
        jobs = _take_within(first, budget, num_tokens // 2 if second else 0, places)
        jobs += _take_within(second, budget, 0, places, may_exceed=not jobs)
        jobs += _take_within(first, budget, 0, places, may_exceed=False)
        return jobs

    def observe_reading(self, jobs: list[Job], seconds: float) -> None:
        """Note how long reading jobs took."""
        num_tokens = sum(len(job.branch) for job in jobs)
        self._num_decoded, self._decoding_seconds, self._reading_seconds = 0, 0.0, seconds
        self._tokens_per_second = _smooth(self._tokens_per_second, num_tokens / seconds)
        self._seconds_per_job = _smooth(self._seconds_per_job, seconds / len(jobs))

    def observe_decoding(self, seconds: float) -> None:
        """Note how long a token of each running chat took."""
        self._num_decoded += 1
        self._decoding_seconds += seconds

    def drop_over(self, now: float) -> None:
        """Drop jobs that were cancelled, and give up those that are late."""
        for queue in (self.chats, self.others):
            if not any(job.is_cancelled or job.is_late(now) for job in queue):
                continue
            jobs = list(queue)
            queue.clear()
            for job in jobs:
                if job.is_late(now):
                    job.resolve(DeadlineError())
                elif not job.is_cancelled:
                    queue.append(job)

    def _may_interrupt(self) -> bool:
        """Return whether running chats have had their share since jobs were read last."""
        had_tokens = self._num_decoded >= PATIENCE or self._decoding_seconds >= MAX_WAIT
        # Where reading is slow, each of the two gets half of the time.
        return had_tokens and self._decoding_seconds >= self._reading_seconds / 2

    def _step_tokens(self, num_chats: int) -> int:
        """Return the tokens that may be read in this step: fewer where running chats would wait for long."""
        if not num_chats or not self._tokens_per_second:
            return self.config.step_tokens
        return min(self.config.step_tokens, int(MAX_PAUSE * self._tokens_per_second))


def _take_within(
    queue: deque[Job], budget: Budget, reserved: int, places: Places, may_exceed: bool = True
) -> list[Job]:
    """Take jobs from the front of a queue.

    Args:
        queue: the queue.
        budget: of tokens.
        reserved: tokens of the budget that are left to others.
        places: of chats.
        may_exceed: whether the first job is taken even if it does not fit.
    """
    taken: list[Job] = []
    while queue and places.allow(queue[0]):
        fits = budget.cost(queue[0]) <= budget.remaining - reserved
        if not fits and not (may_exceed and not taken):
            break
        taken.append(queue.popleft())
        budget.spend(taken[-1])
        places.add(taken[-1])
    return taken


def _smooth(average: float, value: float) -> float:
    """Return a moving average, which begins with the first value."""
    return value if not average else average + SMOOTHING * (value - average)
