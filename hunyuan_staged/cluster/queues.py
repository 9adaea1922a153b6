"""Which job each kind of actor makes next, and what became of each job. Knows no Ray, and waits for nothing."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hunyuan_staged.jobs.outcomes import BUSY, FAILED, Outcome
from hunyuan_staged.jobs.reading import Job

AHEAD = 2  # jobs that wait for a stage, for each of its actors, before the stage ahead of it pauses
MAX_LOSSES = 5  # of the processes that make one job; such a job is more likely the cause than the victim
BUSY_SECONDS = (
    120.0  # that a lock is waited for: a process that is told to leave ends its step, and a dead node's lock expires
)


@dataclass
class _Progress:
    """How far a job has come: seconds so far, how often its processes were lost, since when its folder has been locked."""

    seconds: float = 0.0
    losses: int = 0
    busy_since: float | None = None
    retry_at: float = 0.0


@dataclass
class Queues:
    """The jobs on their way through the stages, which are counted from 0; actors: how many each stage has.

    A stage gets no further jobs while AHEAD x actors wait for the next one, or are about to.
    """

    jobs: Sequence[Job]
    actors: Sequence[int]
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # of the jobs that have ended, by name

    def __post_init__(self) -> None:
        self._waiting = [deque[Job]() for _ in self.actors]
        self._waiting[0].extend(self.jobs)
        self._making = [0 for _ in self.actors]
        self._given_up: dict[int, str] = {}
        self._about = {job.name: _Progress() for job in self.jobs}

    @property
    def ended(self) -> bool:
        """Whether all jobs have."""
        return len(self.outcomes) == len(self.jobs)

    @property
    def steps(self) -> int:
        """How many stages of jobs are over, of len(jobs) x len(actors)."""
        left = sum(
            (len(self._waiting[stage]) + self._making[stage]) * (len(self.actors) - stage)
            for stage in range(len(self.actors))
        )
        return len(self.jobs) * len(self.actors) - left

    def is_over(self, stage: int) -> bool:
        """Whether no job will come to a stage any more."""
        return not any(self._waiting[: stage + 1]) and not any(self._making[: stage + 1])

    def take(self, stage: int, now: float) -> Job | None:
        """The next job of a stage; None where there is none, or the next stage is behind. now: in seconds."""
        following = stage + 1
        if following < len(self.actors):
            ahead = len(self._waiting[following]) + self._making[stage]
            if ahead >= AHEAD * self.actors[following]:
                return None
        waiting = self._waiting[stage]
        job = next((job for job in waiting if self._about[job.name].retry_at <= now), None)
        if job is not None:
            waiting.remove(job)
            self._making[stage] += 1
        return job

    def finish(self, stage: int, job: Job, outcome: Outcome, now: float) -> None:
        """A stage is through with a job: it goes on to the next one, or ends."""
        self._making[stage] -= 1
        about = self._about[job.name]
        about.seconds += outcome.seconds
        if outcome.status == BUSY:
            about.busy_since = now if about.busy_since is None else about.busy_since
            if now - about.busy_since < BUSY_SECONDS:
                about.retry_at = now + 1
                self._waiting[stage].append(job)
                return
        about.busy_since = None
        if outcome.failed or stage + 1 == len(self.actors):
            self.outcomes[job.name] = replace(outcome, seconds=about.seconds)
        elif stage + 1 in self._given_up:
            self._fail(job, self._given_up[stage + 1])
        else:
            self._waiting[stage + 1].append(job)

    def lose(self, stage: int, job: Job, why: str) -> bool:
        """The processes that made a job are gone. It is the next one of its stage; False: it was lost too often."""
        self._making[stage] -= 1
        about = self._about[job.name]
        about.losses += 1
        if stage in self._given_up:
            self._fail(job, self._given_up[stage])
        elif about.losses < MAX_LOSSES:
            self._waiting[stage].appendleft(job)
            return True
        else:
            self._fail(job, f"lost {about.losses} times, at last: {why}")
        return False

    def give_up(self, stage: int, why: str) -> None:
        """A stage has no actors any more, and will have none: what waits for it fails, and what is still to come."""
        self._given_up[stage] = why
        while self._waiting[stage]:
            self._fail(self._waiting[stage].popleft(), why)

    def _fail(self, job: Job, why: str) -> None:
        self.outcomes[job.name] = Outcome(job.name, FAILED, why, self._about[job.name].seconds)
