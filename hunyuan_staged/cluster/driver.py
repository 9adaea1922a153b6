"""The driver: starts the actors by Ray, hands each its jobs, and has what an actor leaves behind go on elsewhere."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_staged.cluster.actor import Reply, StageActor, StageCommand
from hunyuan_staged.cluster.queues import Queues
from hunyuan_staged.errors import InputError, one_line
from hunyuan_staged.files import contract
from hunyuan_staged.jobs.outcomes import FAILED, Outcome
from hunyuan_staged.jobs.reading import Job, text_of
from hunyuan_staged.pipeline.job_folders import failure_of
from hunyuan_staged.runtime.gpus import visible_gpus
from hunyuan_staged.runtime.signals import Interrupts

ADDRESS = "RAY_ADDRESS"  # the variable by which Ray finds a cluster
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"
OBJECT_STORE_BYTES = 80 * 2**20  # near the least that Ray takes: jobs and outcomes are lines of text
POLL_SECONDS = 0.5
ROOM_SECONDS = 60.0  # that an actor takes to start at most where there is room for it
MAX_STARTS = 5  # of one actor, in a row, without a job that it ended


@dataclass(frozen=True)
class Pool:
    """The actors of one kind. number: the stage's; gpus: of each actor."""

    kind: str
    number: int
    count: int
    gpus: float
    command: StageCommand


@dataclass
class _Slot:
    """One actor of a pool, or the place of one that is gone. call: what it is asked and has not answered, None: idle.

    since: when it was to start, until somebody has been told that it waits; failure: what was there before its job.
    """

    stage: int
    name: str
    handle: Any = None
    call: Any = None
    job: Job | None = None
    starts: int = 0
    started: bool = False
    since: float | None = None
    failure: Any = None


def import_ray() -> Any:
    """Ray; InputError says how to install it."""
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InputError("Ray is not installed: pip install 'ray>=2.9', or this package with [cluster]") from error
    return ray


@contextlib.contextmanager
def connected(pools: Sequence[Pool], *, dashboard: bool) -> Iterator[Any]:
    """Ray on the cluster that RAY_ADDRESS names, else on this machine; left, or ended, with the block.

    InputError: it cannot be reached, or this machine has fewer GPUs than the pools take.
    """
    ray = import_ray()
    address = os.environ.get(ADDRESS)
    wanted = sum(pool.count * pool.gpus for pool in pools)
    where: dict[str, Any] = {"address": address}
    if not address:
        if wanted > visible_gpus():
            text = f"the actors take {wanted:g} GPUs, and this machine has {visible_gpus()}"
            raise InputError(f"{pools[1].gpus:g}: {text}; 0 is for CPUs", option="gpus_per_denoiser")
        where = {"address": "local", "include_dashboard": dashboard, "object_store_memory": OBJECT_STORE_BYTES}
    os.environ.setdefault(USAGE_STATS, "0")
    # The other nodes have the code at the same place.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ray.init(**where, log_to_driver=False, logging_level="error", runtime_env={"env_vars": {"PYTHONPATH": path}})
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"Ray does not start ({ADDRESS} is {address}): {one_line(error)}") from error
    try:
        there = ray.cluster_resources().get("GPU", 0)
        if wanted > there:
            say(f"warning: the actors take {wanted:g} GPUs, and the cluster has {there:g}: some wait for further nodes")
        yield ray
    finally:
        ray.shutdown()


def say(text: str) -> None:
    """A line for the user, which does not tear a bar apart."""
    from tqdm import tqdm

    tqdm.write(one_line(text), file=sys.stderr)


class Driver:
    """Has the actors of all pools make the jobs of the queues, until all have ended or a signal comes.

    folder: of the run, with a folder for each job.
    """

    def __init__(self, ray: Any, pools: Sequence[Pool], queues: Queues, folder: Path, interrupts: Interrupts) -> None:
        from tqdm import tqdm

        self.ray, self.pools, self.queues, self.folder, self.interrupts = ray, pools, queues, folder, interrupts
        self.slots = [
            _Slot(stage, f"{pool.kind} {number}")
            for stage, pool in enumerate(pools)
            for number in range(1, pool.count + 1)
        ]
        total = len(queues.jobs) * len(pools)
        self.bar = tqdm(total=total, unit="stage", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def run(self) -> None:
        """Make all jobs. At a signal every process saves its state and leaves, and it returns."""
        try:
            for slot in self.slots:
                self._start(slot)
            while not self.queues.ended and not self.interrupts.received:
                self._hand_out()
                self._collect()
            self._stop()
        finally:
            self.bar.close()

    def _start(self, slot: _Slot) -> None:
        pool = self.pools[slot.stage]
        own = self.ray.remote(StageActor).options(
            num_cpus=0, num_gpus=pool.gpus, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        log = str(Path(pool.command.log) / f"{slot.name.replace(' ', '')}.log")
        command = StageCommand(**{**vars(pool.command), "log": log})
        slot.starts += 1
        slot.handle, slot.job, slot.started = own.remote(command), None, False
        slot.call, slot.since = slot.handle.start.remote(), time.monotonic()

    def _hand_out(self) -> None:
        """Give each idle actor a job; let go of those that no job will come to, with their GPUs."""
        for slot in reversed(self.slots):
            if slot.handle is None or slot.call is not None:
                continue
            slot.job = self.queues.take(slot.stage, time.monotonic())
            if slot.job is not None:
                slot.failure = self._failure(slot.job)
                slot.call = slot.handle.make.remote(text_of(slot.job))
            elif self.queues.is_over(slot.stage):
                self._end(slot)

    def _collect(self) -> None:
        """Wait a moment for an answer, and take those that are there."""
        for slot in self.slots:
            if slot.since is not None and time.monotonic() - slot.since > ROOM_SECONDS:
                slot.since = None
                say(f"{slot.name} waits for a node with room for it")
        calls = {slot.call: slot for slot in self.slots if slot.call is not None}
        if not calls:
            time.sleep(POLL_SECONDS)
            return
        answered, _ = self.ray.wait(list(calls), num_returns=1, timeout=POLL_SECONDS)
        for call in answered:
            self._take(calls[call], call)
        self.bar.update(self.queues.steps - self.bar.n)

    def _take(self, slot: _Slot, call: Any) -> None:
        job, slot.call, slot.job = slot.job, None, None
        try:
            answer = self.ray.get(call)
        except self.ray.exceptions.RayActorError as error:
            self._replace(slot, job, one_line(error))
            return
        if job is None:
            slot.started, slot.since = True, None
            say(f"{slot.name} is ready on {answer}")
            return
        assert isinstance(answer, Reply)
        if answer.outcome is not None:
            slot.starts = 1
            self._finish(slot, job, answer.outcome)
        elif (failure := self._failure(job)) not in (None, slot.failure):
            # A fault of ours, which ends all processes that make a job together, and would do so again.
            self._finish(slot, job, Outcome(job.name, FAILED, failure[1]))
        else:
            self._lose(slot, job, answer.ended)

    def _failure(self, job: Job) -> tuple[int, str] | None:
        """When it was recorded in a job's folder that the job has failed, and why; None: nothing is."""
        folder = self.folder / job.name
        found = failure_of(folder)
        try:
            return found and ((folder / contract.FAILURE_FILE).stat().st_mtime_ns, found[1])
        except FileNotFoundError:
            return None

    def _finish(self, slot: _Slot, job: Job, outcome: Outcome) -> None:
        self.queues.finish(slot.stage, job, outcome, time.monotonic())
        if job.name in self.queues.outcomes:
            say(f"{len(self.queues.outcomes)} of {len(self.queues.jobs)}: {self.queues.outcomes[job.name].line}")

    def _lose(self, slot: _Slot, job: Job, why: str) -> None:
        if not self.interrupts.received:
            goes_on = self.queues.lose(slot.stage, job, why)
            say(f"{slot.name} {why}; {job.name} {'goes on elsewhere' if goes_on else 'is given up'}")

    def _replace(self, slot: _Slot, job: Job | None, why: str) -> None:
        """An actor is gone, or its node is: another one takes its place wherever there is one."""
        self._end(slot)
        if job is not None:
            self._lose(slot, job, "was lost")
        if self.interrupts.received:
            return
        if slot.starts < MAX_STARTS:
            self._start(slot)
            return
        say(f"{slot.name} was lost {slot.starts} times in a row, and is given up: {why}")
        if not any(other.handle is not None for other in self.slots if other.stage == slot.stage):
            self.queues.give_up(slot.stage, f"no {self.pools[slot.stage].kind} is left: {why}")

    def _end(self, slot: _Slot) -> None:
        """Kill an actor, which ends its processes."""
        self.ray.kill(slot.handle)
        slot.handle = slot.call = None

    def _stop(self) -> None:
        """Have the processes leave in good order, and wait until they have; a second signal ends this process at once."""
        calls = []
        for slot in self.slots:
            if slot.handle is not None and slot.started:
                slot.handle.stop.remote(self.interrupts.received or signal.SIGTERM)
                calls += [slot.call] if slot.call is not None else []
        if calls:
            self.ray.wait(calls, num_returns=len(calls))
        for slot in self.slots:
            if slot.handle is not None:
                self._end(slot)
