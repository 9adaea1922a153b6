"""Which job comes next on a cluster, and what becomes of those that are lost."""

from hunyuan_staged.cluster.queues import AHEAD, BUSY_SECONDS, MAX_LOSSES, Queues
from hunyuan_staged.jobs.outcomes import BUSY, DONE, FAILED, Outcome
from hunyuan_staged.jobs.reading import Job


def queues(count: int, *actors: int) -> Queues:
    return Queues([Job(f"job{number}", "here", {}) for number in range(count)], actors)


def taken(found: Queues, stage: int, now: float = 0.0) -> str | None:
    job = found.take(stage, now)
    return job and job.name


def finish(found: Queues, stage: int, name: str, status: str = DONE, now: float = 0.0) -> None:
    job = next(job for job in found.jobs if job.name == name)
    found.finish(stage, job, Outcome(name, status, "why" * (status != DONE), 1.5), now)


def test_a_job_goes_through_all_stages_and_its_seconds_add_up():
    found = queues(1, 1, 1, 1)
    for stage in range(3):
        assert [taken(found, other) for other in range(3) if other != stage] == [None, None]
        assert (taken(found, stage), found.steps, found.ended) == ("job0", stage, False)
        finish(found, stage, "job0")
        assert found.is_over(stage) and found.is_over(2) == (stage == 2)
    assert found.ended and found.steps == 3
    assert found.outcomes == {"job0": Outcome("job0", DONE, "", 4.5)}


def test_a_stage_pauses_while_the_next_one_is_behind():
    found = queues(9, 1, 2)
    names = [taken(found, 0) for _ in range(2 * AHEAD + 1)]
    assert names == ["job0", "job1", "job2", "job3", None]
    for name in names[:-1]:
        finish(found, 0, name)
    assert taken(found, 0) is None  # all four wait
    assert taken(found, 1) == "job0" and taken(found, 0) == "job4"


def test_a_failure_ends_a_job_and_leaves_the_others_alone():
    found = queues(2, 1, 1)
    assert taken(found, 0) == "job0"
    finish(found, 0, "job0", FAILED)
    assert found.outcomes["job0"] == Outcome("job0", FAILED, "why", 1.5)
    assert found.steps == 2
    assert taken(found, 1) is None and taken(found, 0) == "job1"


def test_a_lost_job_is_the_next_one_until_it_is_lost_too_often():
    found = queues(2, 1)
    for _ in range(MAX_LOSSES - 1):
        assert taken(found, 0) == "job0"
        assert found.lose(0, found.jobs[0], "ended")
    assert taken(found, 0) == "job0"
    assert not found.lose(0, found.jobs[0], "ended with status 1")
    assert found.outcomes["job0"].line == "job0: failed: lost 5 times, at last: ended with status 1"
    assert taken(found, 0) == "job1" and not found.ended


def test_a_locked_folder_is_waited_for_while_others_go_ahead():
    found = queues(2, 1)
    assert taken(found, 0) == "job0"
    finish(found, 0, "job0", BUSY, now=10.0)
    assert [taken(found, 0, 10.5), taken(found, 0, 10.5), taken(found, 0, 11.0)] == ["job1", None, "job0"]
    finish(found, 0, "job0", BUSY, now=10.0 + BUSY_SECONDS)
    assert found.outcomes["job0"].status == BUSY


def test_without_an_actor_what_waits_for_it_fails():
    found = queues(3, 1, 1)
    for name in ("job0", "job1"):
        assert taken(found, 0) == name
        finish(found, 0, name)
    found.give_up(1, "no denoiser is left")
    assert {one.line for one in found.outcomes.values()} == {f"job{n}: failed: no denoiser is left" for n in range(2)}
    assert taken(found, 0) == "job2"
    finish(found, 0, "job2")
    assert found.ended and found.outcomes["job2"].text == "no denoiser is left"
