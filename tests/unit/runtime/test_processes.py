"""Processes of a launcher: what each is started in, and what becomes of them."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import utils
from hunyuan_staged.errors import InputError
from hunyuan_staged.parallel.world import World, check_devices
from hunyuan_staged.runtime import environment, processes
from hunyuan_staged.runtime.environment import TURN_PIPE, WHOLE_RUN, Early, await_turn
from hunyuan_staged.runtime.processes import Supervisor, child_environment


@pytest.fixture
def clean(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "cores", lambda: 12)
    return monkeypatch


def test_each_process_gets_its_share_of_the_cores(clean):
    """torchrun gives each process one thread."""
    one, four = child_environment(1), child_environment(4)
    assert "OMP_NUM_THREADS" not in one and four["OMP_NUM_THREADS"] == "3"
    assert (one["TORCHINDUCTOR_COMPILE_THREADS"], four["TORCHINDUCTOR_COMPILE_THREADS"]) == ("12", "3")
    assert child_environment(100)["OMP_NUM_THREADS"] == "1"
    assert four["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_what_the_user_set_stays_and_what_a_launcher_left_goes(clean):
    for name, value in {"OMP_NUM_THREADS": "7", "PYTORCH_CUDA_ALLOC_CONF": "x", "RANK": "1", "LOCAL_RANK": "1"}.items():
        clean.setenv(name, value)
    own = child_environment(4)
    assert own["OMP_NUM_THREADS"] == "7"
    assert not {"PYTORCH_ALLOC_CONF", "RANK", "LOCAL_RANK"} & own.keys()


@pytest.mark.parametrize("count", [1, 4])
def test_torchrun_and_python_give_torch_the_launchers_settings(clean, count):
    """They did only where run_staged.sh started the stage: four ranks by torchrun began 48 compilers."""
    clean.setattr(environment, "cores", lambda: 12)
    clean.setattr(os, "environ", dict(os.environ))
    if count > 1:
        os.environ.update({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"})
        os.environ.update({"MASTER_ADDR": "x", "MASTER_PORT": "1"})
    started = child_environment(count)
    found = {}

    def body(run, _):
        found.update(os.environ)

    clean.setattr(utils, "check_environment", lambda: None)
    clean.setattr("hunyuan_staged.parallel.world.start_world", lambda: World(0, 1, torch.device("cpu")))
    assert utils.run_stage("stage x", argparse.Namespace(debug=False, log_json=None), body=body) == 0
    for name in ("TORCHINDUCTOR_COMPILE_THREADS", "PYTORCH_ALLOC_CONF"):
        assert found[name] == started[name]
    os.environ.update(TORCHINDUCTOR_COMPILE_THREADS="7", PYTORCH_CUDA_ALLOC_CONF="x")
    del os.environ["PYTORCH_ALLOC_CONF"]
    environment.set_library_settings()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "7" and "PYTORCH_ALLOC_CONF" not in os.environ


def test_the_first_failure_ends_the_others_and_its_status_is_kept(capfd):
    program = "import os, sys, time; sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(600)"
    # The signal is held back in the child, as the launcher starts it, until it listens.
    program = f"import signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, [15]); {program}"
    with Supervisor() as supervisor:
        status = supervisor.run([sys.executable, "-c", program], 3, name="x.py")
    assert status == 5
    assert capfd.readouterr().err == "error: x.py: process 1 of 3 ended with status 5\n"


def test_a_program_that_is_not_there(tmp_path):
    with Supervisor() as supervisor, pytest.raises(InputError, match="cannot start nobody: No such file or directory"):
        supervisor.run([str(tmp_path / "nobody")], 2, name="x.py")


def test_a_launcher_that_is_killed_takes_its_processes_with_it(tmp_path):
    """Both ranks and the lock stayed for more than 30 s."""
    child = "import os, signal, time; signal.pthread_sigmask(signal.SIG_UNBLOCK, [15]); "
    child += f"open(f'{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(600)"
    program = f"""import sys
from hunyuan_staged.runtime.processes import Supervisor
with Supervisor() as supervisor:
    supervisor.run([sys.executable, "-c", {child!r}], 2, name="x.py")
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while len(list(tmp_path.iterdir())) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(alive(int(file.name)) for file in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_more_processes_than_gpus_are_refused():
    """NCCL ended every process in a traceback."""
    check_devices(["a GPU-1", "a GPU-2", "b GPU-1"])
    with pytest.raises(InputError, match=r"^3 processes share 2 GPUs on a; start one a GPU$"):
        check_devices(["a GPU-1", "a GPU-2", "a GPU-1", "b GPU-1"])


def test_cores_are_those_that_may_be_used():
    assert processes.cores() == len(os.sched_getaffinity(0))


def started_early(supervisor, folder, count=2, first="import sys; sys.exit(0)"):
    """(A group whose turn comes at once, one that waits); what the second does is a file `done` a process."""
    program = f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
from hunyuan_staged.runtime.environment import await_turn
turn = await_turn(lambda is_due: __import__("this"))
open(f"{folder}/" + ("done" if turn else "left") + str(os.getpid()), "w").close()
"""
    groups = [supervisor.start([sys.executable, "-c", first], 1, name="first.py")]
    groups.append(supervisor.start([sys.executable, "-c", program], count, name="second.py", early=""))
    return groups


def test_a_stage_that_starts_early_waits_for_its_turn(tmp_path, capfd):
    """Python's poem says when its modules are imported: before its turn."""
    with Supervisor() as supervisor:
        first, second = started_early(supervisor, tmp_path)
        shown = ""
        while shown.count("Namespaces are one honking great idea") < 2:
            assert all(process.poll() is None for process in second.processes)
            shown += capfd.readouterr().out
            time.sleep(0.02)
        assert supervisor.finish(first) == 0
        assert not list(tmp_path.iterdir())
        assert supervisor.finish(second) == 0
    assert sorted(file.name[:4] for file in tmp_path.iterdir()) == ["done", "done"]


def test_a_stage_whose_turn_does_not_come_ends_in_silence(tmp_path, capfd):
    with Supervisor() as supervisor:
        first, second = started_early(supervisor, tmp_path, first="import sys; sys.exit(7)")
        assert supervisor.finish(first) == 7
    assert [process.returncode for process in second.processes] == [-signal.SIGKILL] * 2
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


def test_a_stage_that_waits_ends_with_a_launcher_that_was_killed(tmp_path):
    """Its signals are held back: it sees that the pipe has ended."""
    program = f"""import sys
sys.path.insert(0, {str(ROOT / "tests/unit/runtime")!r})
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_processes import Supervisor, started_early
with Supervisor() as supervisor:
    first, second = started_early(supervisor, {str(tmp_path)!r}, 1, "import time; time.sleep(600)")
    open({str(tmp_path / "pid")!r}, "w").write(str(second.processes[0].pid))
    supervisor.finish(first)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    while alive(int(pid.read_text())):
        time.sleep(0.05)
    assert (tmp_path / f"left{pid.read_text()}").exists()


def test_a_stage_by_itself_waits_for_nothing(monkeypatch):
    monkeypatch.delenv(TURN_PIPE, raising=False)
    assert await_turn(lambda is_due: pytest.fail("it is not to get ready")) == Early()


@pytest.mark.parametrize("whole", [False, True])
def test_a_stage_knows_whether_it_is_one_of_a_whole_run(whole, monkeypatch):
    monkeypatch.delenv(WHOLE_RUN, raising=False)
    program = f"import os, sys; sys.exit(7 if os.environ.get({WHOLE_RUN!r}) == '12.5' else 0)"
    with Supervisor() as supervisor:
        status = supervisor.run([sys.executable, "-c", program], 1, name="x.py", began=12.5 if whole else None)
    assert status == (7 if whole else 0)


@pytest.mark.parametrize("whole", [False, True])
def test_a_stage_of_a_whole_run_ends_at_once_with_its_status_and_what_it_said(whole, tmp_path, monkeypatch, capfd):
    """Python's own end, which takes down what a library has left, took seconds, while the next stage waited."""
    monkeypatch.delenv(WHOLE_RUN, raising=False)
    program = f"""import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
import utils
atexit.register(print, "Python's own end")
def main():
    sys.stdout.write("done")
    return 5
utils.run_script(main)
"""
    with Supervisor() as supervisor:
        assert supervisor.run([sys.executable, "-c", program], 1, name="x.py", began=12.5 if whole else None) == 5
    assert capfd.readouterr().out == ("done" if whole else "donePython's own end\n")


def test_garbage_is_left_while_modules_are_imported_and_what_they_made_is_kept():
    program = f"""import gc, sys
sys.path.insert(0, {str(ROOT)!r})
from hunyuan_staged.runtime.environment import imports_begin, imports_end
imports_end()
before = gc.get_freeze_count()
imports_begin()
off = gc.isenabled()
imports_end()
print(before, off, gc.isenabled(), gc.get_freeze_count() > 1000)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "0 False True True\n"
