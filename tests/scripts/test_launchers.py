"""The launchers: how many processes, which flags, which status; with a stand-in for Python that writes down its calls."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from folders import embed
from forked import heed_interrupts

from hunyuan_staged.files import contract

# Writes down each call of a stage, and lets the launcher itself run; fails with the status in FAIL_AT's stage.
STAND_IN = """\
#!/usr/bin/env bash
case "$*" in
*hunyuan_staged.launch*) exec "$REAL_PYTHON" "$@" ;;
esac
if [[ -n ${HUNYUAN_STAGED_TURN_PIPE:-} ]]; then
    printf '%s\\n' "$HUNYUAN_STAGED_RUN_FLAGS" >>"$CALLS.told"
    IFS= read -r -d '' -n 1 -u "$HUNYUAN_STAGED_TURN_PIPE" || exit 0 # its turn does not come
fi
printf '%s\\n' "${RANK+rank $RANK of $WORLD_SIZE: }$*" >>"$CALLS"
if [[ -n ${FAIL_AT:-} && "$*" == *"$FAIL_AT"* ]]; then exit 7; fi
"""


@pytest.fixture
def launch(tmp_path):
    """Call a launcher with the stand-in as $PYTHON; returns the finished process and the calls that it made."""
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(script: str, *args: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if name not in ("GPUS", "CUDA_VISIBLE_DEVICES")}
        clean |= {"PYTHON": str(stand_in), "REAL_PYTHON": sys.executable, "CALLS": str(calls)} | environment
        command = ["bash", str(ROOT / script), *args]
        result = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, cwd=tmp_path)
        return result, calls.read_text().replace(f"{ROOT}/", "").splitlines()

    return run


def ranks(count: int, call: str) -> list[str]:
    """What `count` processes of a launch write down, sorted; one has no rank."""
    return [f"rank {rank} of {count}: {call}" for rank in range(count)] if count > 1 else [call]


@pytest.mark.parametrize(
    ("args", "environment", "count"),
    [
        ([], {"CUDA_VISIBLE_DEVICES": ""}, 1),
        ([], {"CUDA_VISIBLE_DEVICES": "-1"}, 1),
        ([], {"CUDA_VISIBLE_DEVICES": "3"}, 1),
        ([], {"CUDA_VISIBLE_DEVICES": "2,3"}, 2),
        ([], {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7,8"}, 8),
        ([], {"GPUS": "3"}, 3),
        (["--gpus", "4"], {"GPUS": "3"}, 4),
        (["--gpus=2"], {"CUDA_VISIBLE_DEVICES": ""}, 2),
        (["--gpus", "1"], {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_process_count(launch, args, environment, count, stage):
    script = ("stage1_text_encoder.py", "stage2_transformer.py", "stage3_vae_decoder.py")[stage - 1]
    result, calls = launch(f"run_stage{stage}.sh", *args, "--debug", **environment)
    assert result.returncode == 0, result.stderr
    assert sorted(calls) == ranks(1 if stage == 1 else count, f"{script} --debug")


@pytest.mark.parametrize("count", ["0", "two", "-1", ""])
def test_a_bad_count_is_refused(launch, count):
    result, calls = launch("run_stage2.sh", f"--gpus={count}", CUDA_VISIBLE_DEVICES="")
    if count == "":  # as if not given
        assert result.returncode == 0
    else:
        assert result.returncode == 2
        assert result.stderr == f"error: --gpus {count} is not a positive number\n"
        assert calls == []


def test_a_whole_run_hands_out_the_flags(launch, tmp_path):
    args = ["--prompt", 'it\'s "a" cat', "--seed", "7", "--fps", "12", "--output_dir", "my runs/a"]
    result, calls = launch("run_staged.sh", *args, "--gpus", "2")
    assert result.returncode == 0, result.stderr
    assert [calls[0], *sorted(calls[1:3]), *sorted(calls[3:])] == [
        'stage1_text_encoder.py --prompt=it\'s "a" cat --output_dir=my runs/a',
        *ranks(2, "stage2_transformer.py --seed=7 --input_dir=my runs/a"),
        *ranks(2, "stage3_vae_decoder.py --fps=12 --input_dir=my runs/a"),
    ]
    assert result.stdout == f"{tmp_path}/my runs/a/output_video.mp4\n", "and nothing else"
    all_but_texts = [["--output_dir=my runs/a"], ["--seed=7", "--input_dir=my runs/a"]]
    all_but_texts.append(["--fps=12", "--input_dir=my runs/a"])
    told = sorted(json.loads(line) for line in (tmp_path / "calls.told").read_text().splitlines())
    assert told == [[stage, all_but_texts] for stage in (1, 1, 2, 2)], "those that wait"


@pytest.mark.parametrize(("stage", "made"), [("stage1", 1), ("stage2", 2), ("stage3", 3)])
def test_a_whole_run_stops_at_the_first_failure_with_its_status(launch, stage, made):
    result, calls = launch("run_staged.sh", "--gpus", "1", FAIL_AT=stage)
    assert result.returncode == 7
    assert len(calls) == made


def test_a_flag_of_nobody_is_refused_before_anything_starts(launch):
    result, calls = launch("run_staged.sh", "--prompt", "x", "--sede", "7", "--gpus", "1")
    assert result.returncode == 2
    assert result.stderr == "error: --sede is a flag of no stage; did you mean --seed?\n"
    assert calls == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--flow_shift 0", "--flow_shift 0 is not above 0 and up to 100"),
        ("--flow_shift nan", "--flow_shift nan is not above 0 and up to 100"),
        ("--four_steps --num_inference_steps 5", "--num_inference_steps 5 contradicts --four_steps, 4"),
        ("--four_steps --preset fast", "--preset fast is for weights of many steps, and --four_steps takes few"),
        ("--four_steps --guidance_interval 0,0.5", "--guidance_interval needs guidance, and this run has none: "
         "--guidance_scale is 1"),
        ("--guidance_scale 1 --guidance_reuse 2", "--guidance_reuse needs guidance, and this run has none: "
         "--guidance_scale is 1"),
        ("--num_inference_steps 5 --guidance_interval 0.1,0.15", "--guidance_interval 0.1,0.15 holds none of 5 steps"),
        ("--num_inference_steps 5 --attn_schedule exact:0-5", "--attn_schedule step 5 is none of this run's 5, 0 to 4"),
        ("--num_inference_steps 5 --enable_cache --cache_steps 0-5", "--cache_steps step 5 is none of this run's 5"),
        ("--sigmas 1,0.5 --enable_cache", "--enable_cache: of 2 steps none between --cache_start_step 1 and "
         "--cache_end_step 2 can be reused; run without a cache, or set them apart"),
        ("--num_inference_steps 1 --preset balanced", "--enable_cache: of 1 steps none between --cache_start_step 0 "
         "and --cache_end_step 1 can be reused; run without a cache, or set them apart"),
    ],
)  # fmt: skip
def test_what_no_version_can_run_so_is_refused_before_stage_1_writes(launch, flags, message):
    """Stage 1 had written over the embeddings and the config of the run before when stage 2 said so."""
    result, calls = launch("run_staged.sh", *flags.split())
    assert (result.returncode, result.stderr, calls) == (2, f"error: {message}\n", [])


HEADER = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
WHOLE = len(HEADER).to_bytes(8, "little") + HEADER + b"ab"
NO_WEIGHTS = {
    "cut": WHOLE[:-1], "longer": WHOLE + b"a", "head": WHOLE[:20], "empty": b"", "page": b"<html>404</html>",
    "list": (2).to_bytes(8, "little") + b"[]", "odd": (8).to_bytes(8, "little") + b'{"a": 1}',
}  # fmt: skip
READ = "read is safetensors in float32, bfloat16, float16, or float8 with scales"


def no_weights():
    for name in NO_WEIGHTS:
        yield f"--vae {name}", f"--vae {name} is not a whole safetensors file"
    for flag in ("--transformer", "--lora", "--text_encoder", "--super_resolution 720p --super_resolution_upsampler"):
        last = flag.split()[-1]
        yield f"{flag} page", f"{last} page is not a whole safetensors file"
        yield f"{flag} pickle", f"{last} pickle is a pickled PyTorch file; {READ}"
    yield "--lora cut:0.5", "--lora cut is not a whole safetensors file"
    yield (
        "--vae gguf",
        f"--vae gguf is a GGUF file, which is read for the transformer alone; {READ.replace('is', 'here is', 1)}",
    )
    yield "--transformer none", "--transformer none does not exist"
    yield "--transformer pipe", "--transformer pipe is no file"
    yield "--transformer folder", f"--transformer folder is a folder; {READ.replace('is', 'is one file:', 1)}"


@pytest.mark.parametrize(("flags", "message"), list(no_weights()))
def test_a_file_without_weights_is_refused_before_the_first_stage(launch, tmp_path, flags, message):
    """A VAE's was found when the latents were done: after an hour, with real weights."""
    for name, content in (NO_WEIGHTS | {"pickle": b"PK\x03\x04aaaa", "gguf": b"GGUF"}).items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    result, calls = launch("run_staged.sh", *flags.split())
    assert (result.returncode, result.stderr, calls) == (2, f"error: {message}\n", [])


def test_whole_files_go_to_the_stages(launch, tmp_path):
    (tmp_path / "whole").write_bytes(WHOLE)
    (tmp_path / "gguf").write_bytes(b"GGUF")
    (tmp_path / "folder").mkdir()
    result, calls = launch(
        "run_staged.sh", *["--vae", "whole", "--lora", "whole:0.5", "--lora", "folder", "--transformer", "gguf"]
    )
    assert (result.returncode, len(calls)) == (0, 3), result.stderr


@pytest.mark.parametrize("flags", ["--preset balanced --num_inference_steps 10", "--four_steps --preset exact",
                                   "--enable_cache --cache_type magcache --num_inference_steps 2",
                                   "--enable_cache --no_cache_block_id 3 --num_inference_steps 30"])  # fmt: skip
def test_what_a_version_may_run_so_is_left_to_it(launch, flags):
    result, calls = launch("run_staged.sh", *flags.split())
    assert (result.returncode, len(calls)) == (0, 3), result.stderr


def test_help_names_the_stages(launch):
    result, calls = launch("run_staged.sh", "--help")
    assert result.returncode == 0
    assert "python stage2_transformer.py --help" in result.stdout
    assert "--gpus N" in result.stdout
    assert calls == []


@pytest.mark.parametrize("count", ["1", "2"])
def test_help_of_one_stage_is_shown_once(launch, count):
    """Under torchrun every process printed it."""
    result, calls = launch("run_stage2.sh", "--gpus", count, "--help")
    assert result.returncode == 0
    assert result.stdout.count("usage: stage2_transformer.py") == 1
    assert calls == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sede", "7"], "error: unrecognized arguments: --sede 7 (see stage2_transformer.py --help)\n"),
        (["--video_length", "10"], "error: --video_length 10 is not 4n+1; the nearest are 9 and 13\n"),
    ],
)
def test_a_bad_flag_is_refused_before_processes_start(launch, flags, message):
    """torchrun made status 1 and a long dump of it."""
    result, calls = launch("run_stage2.sh", "--gpus", "2", *flags)
    assert (result.returncode, result.stderr) == (2, message)
    assert calls == []


# A python3 that lacks every module until it has made .venv: writes down what would be installed.
BARE = """\
#!/usr/bin/env bash
case "$*" in
*urllib.request*) exit 1 ;;
*find_spec*) [[ -e ${0%/*}/../../.made ]] && [[ $0 == */.venv/* ]] ;;
*version_info*) [[ -z ${OLD:-} ]] ;;
--version) echo Python 3.9.2 ;;
*hunyuan_staged.launch*) exec "$REAL_PYTHON" "$@" ;;
*) printf '%s\\n' "${0##*/.venv/}: $*" >>"$CALLS"
    if [[ $1 == -m && $2 == venv ]]; then
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/../.made"
    fi ;;
esac
"""


@pytest.fixture
def bare(tmp_path):
    """A checkout's launchers on a machine whose python3 has nothing; call(script, flags) as `launch` does."""
    import shutil

    checkout, path, calls = tmp_path / "checkout", tmp_path / "bin", tmp_path / "calls"
    checkout.mkdir()
    path.mkdir()
    for file in (*ROOT.glob("*.sh"), *ROOT.glob("*.py")):
        shutil.copy(file, checkout)
    for folder in ("hunyuan_staged", ".ci"):
        (checkout / folder).symlink_to(ROOT / folder)
    (path / "python3").write_text(BARE)
    (path / "python3").chmod(0o755)

    def run(script: str, *args: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.write_text("")
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "GPUS")}
        clean |= {"PATH": f"{path}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable, "CALLS": str(calls)}
        clean |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"} | environment
        command = ["bash", str(checkout / script), *args]
        result = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, cwd=tmp_path)
        return result, calls.read_text().replace(f"{checkout}/", "").replace(f"{path}/", "").splitlines()

    return run


def test_a_bare_machine_gets_an_environment_once(bare, tmp_path):
    result, calls = bare("run_stage3.sh", "--fps", "12")
    assert result.returncode == 0, result.stderr
    assert calls == [
        "python3: -m venv .venv",
        "bin/python: -m pip install torch==2.13.0",
        f"bin/python: -m pip install --editable {tmp_path / 'checkout'}",
        "bin/python: stage3_vae_decoder.py --fps 12",
    ]
    assert "making " in result.stderr
    again, calls = bare("run_stage3.sh")
    assert (again.returncode, again.stderr) == (0, "")
    assert calls == ["bin/python: stage3_vae_decoder.py"], "what is there is respected"


@pytest.mark.parametrize(
    ("script", "flag", "status"),
    [("run_staged.sh", "--help", 0), ("run_stage1.sh", "--help", 0), ("run_staged.sh", "--sede", 2)],
)
def test_help_and_refusals_install_nothing(bare, tmp_path, script, flag, status):
    result, calls = bare(script, flag)
    assert result.returncode == status, result.stderr
    assert calls == []
    assert not (tmp_path / "checkout" / ".venv").exists()


def test_an_old_python_is_refused(bare):
    result, calls = bare("run_staged.sh", OLD="1")
    assert result.returncode == 2
    assert result.stderr == "error: python3 is Python 3.9.2; Python 3.11 or later is needed\n"
    assert calls == []


def test_launchers_stop_at_errors_and_unset_variables():
    for script in sorted(Path(ROOT).glob("run_*.sh")):
        assert "set -euo pipefail" in script.read_text(), script.name


# Waits for a signal as a stage does, and ends with its status. A launcher starts it with signals held back.
PATIENT = """\
#!/usr/bin/env bash
case "$*" in
*hunyuan_staged.launch*) exec "$REAL_PYTHON" "$@" ;;
esac
exec "$REAL_PYTHON" -c '
import os, signal, sys
turn = os.environ.get("HUNYUAN_STAGED_TURN_PIPE")
if turn and not os.read(int(turn), 1):
    sys.exit(0)
def say(word):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(word + chr(10))
def leave(number, _):
    say("got " + signal.Signals(number).name[3:])
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, leave)
say("ready")
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))
while True:
    signal.pause()
'
"""


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130)])
@pytest.mark.parametrize("script", ["run_staged.sh", "run_stage2.sh"])
def test_a_signal_reaches_the_stage_and_its_status_comes_back(tmp_path, script, name, status):
    """bash died of SIGTERM by itself, and left the stage running."""
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    stand_in.write_text(PATIENT)
    stand_in.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stand_in), "REAL_PYTHON": sys.executable, "CALLS": str(calls)}
    command = ["bash", str(ROOT / script), "--gpus", "1"]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, start_new_session=True, preexec_fn=heed_interrupts
    )
    while not (calls.exists() and "ready" in calls.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.wait(60) == status
    assert calls.read_text() == f"ready\ngot {name}\n", "once, and no stage after it"


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_a_refusal_by_several_processes_is_one_line_and_status_2(tmp_path, stage):
    """torchrun gave status 1 and some fifty lines of its own."""
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / f"run_{stage}.sh"), "--gpus", "2", "--input_dir", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: ")


def test_a_fault_of_ours_keeps_its_traceback_and_status(tmp_path):
    (tmp_path / "broken.py").write_text("raise ZeroDivisionError('ours')\n")
    program = """import sys
from hunyuan_staged.runtime.processes import Supervisor
with Supervisor() as supervisor:
    sys.exit(supervisor.run([sys.executable, sys.argv[1]], 2, name="broken.py"))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "broken.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 1
    assert "ZeroDivisionError: ours" in result.stderr
    assert "error: broken.py: process " in result.stderr


def test_torchrun_by_hand_gives_what_the_launcher_gives(tmp_path, tiny_official):
    inputs = embed(tmp_path / "in", tiny_official)
    flags = ["--input_dir", inputs, "--video_length", 5, "--num_inference_steps", 1, "--output_dir"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    for command in (
        [*torchrun, ROOT / "stage2_transformer.py", *flags, tmp_path / "by hand"],
        ["bash", ROOT / "run_stage2.sh", "--gpus", 2, *flags, tmp_path / "launched"],
    ):
        environment = os.environ | {"PYTHON": sys.executable}
        words = [str(word) for word in command]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "2 guidance" in result.stderr
    name = contract.LATENTS_FILE
    assert (tmp_path / "by hand" / name).read_bytes() == (tmp_path / "launched" / name).read_bytes()
