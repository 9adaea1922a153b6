"""What became of a job."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hunyuan_staged.errors import JOBS_FAILED
from hunyuan_staged.jobs.reading import Jobs

DONE, ALREADY_DONE, FAILED, BUSY = "done", "already done", "failed", "busy"


@dataclass(frozen=True)
class Outcome:
    """What became of a job. status: DONE, ALREADY_DONE, FAILED, BUSY, or what the stage says; text: why it failed."""

    name: str
    status: str
    text: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """A row of the closing table."""
        seconds = f"  {self.seconds:.1f} s" if self.status == DONE else ""
        return f"{self.name}: {self.status}{seconds}{': ' + self.text if self.text else ''}"

    @property
    def failed(self) -> bool:
        """Whether it is counted as a failure."""
        return self.status in (FAILED, BUSY)


def text_of_outcome(outcome: Outcome) -> str:
    """An outcome as one line of text; see read_outcome."""
    return json.dumps(asdict(outcome))


def read_outcome(text: str) -> Outcome:
    """What text_of_outcome wrote."""
    return Outcome(**json.loads(text))


def closing_lines(jobs: Jobs, outcomes: Sequence[Outcome]) -> list[tuple[bool, str]]:
    """The closing table, in the order of the jobs; with each line whether it is a warning."""
    by_name = {one.name: one for one in outcomes}
    rows = [by_name[job.name] for job in jobs.good]
    whole = sum(not one.failed for one in rows)
    return [
        *((one.failed, one.line) for one in rows),
        *((True, f"not a job: {line}") for line in jobs.bad),
        (False, f"{whole} of {len(rows) + len(jobs.bad)} jobs without a failure"),
    ]


def status_of(jobs: Jobs, outcomes: Sequence[Outcome]) -> int:
    """The exit status of many jobs."""
    return JOBS_FAILED if jobs.bad or any(one.failed for one in outcomes) else 0
