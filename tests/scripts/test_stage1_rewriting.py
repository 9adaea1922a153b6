"""stage1_text_encoder.py --rewrite as a user calls it, against a server on the loopback."""

import os
import subprocess
import sys
from pathlib import Path

from chat_server import chatting, completion, failure
from conftest import ROOT

from hunyuan_staged.files.config import read_config

KEY = "sk-secret-0123456789"
PROMPT = 'a card that says "AB"'
LONG = 'A white card, which says "AB", stands still on a dark blue background.'


def call(folder: Path, *args: object, **variables: str) -> subprocess.CompletedProcess:
    words = [sys.executable, ROOT / "stage1_text_encoder.py", "--prompt", PROMPT, "--output_dir", folder, *args]
    environment = os.environ | {"REWRITE_API_KEY": KEY, "no_proxy": "127.0.0.1", **variables}
    return subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)


def test_a_prompt_is_rewritten_as_the_official_variables_say(tmp_path, tiny_official):
    with chatting(completion(f"{LONG}\n")) as server:
        variables = {"T2V_REWRITE_BASE_URL": server.address, "T2V_REWRITE_MODEL_NAME": "m"}
        result = call(tmp_path, "--model_path", tiny_official, "--rewrite", "api", **variables)
        assert result.returncode == 0, result.stderr
        assert server.asked[0][1]["Authorization"] == f"Bearer {KEY}"
    assert f"rewritten by m at {server.address}, instructions t2v_en: {LONG!r}" in result.stderr
    config = read_config(tmp_path)
    assert (config["prompt"], config["rewritten_prompt"]) == (PROMPT, LONG)
    written = [path.read_bytes() for path in tmp_path.iterdir()]
    assert KEY not in result.stderr + result.stdout and not [data for data in written if KEY.encode() in data]


def test_a_server_that_refuses_is_one_line_without_the_key_and_changes_nothing(tmp_path, tiny_official):
    with chatting(failure(401, f"Incorrect API key provided: {KEY}")) as server:
        flags = [
            "--model_path",
            tiny_official,
            "--rewrite",
            server.address,
            "--rewrite_model",
            "m",
            "--strict",
            "--debug",
        ]
        result = call(tmp_path / "out", *flags)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"error: {server.address} refuses (401 Incorrect API key provided: [key]); the key is $REWRITE_API_KEY; "
        "--strict refuses that"
    )
    assert "Traceback" in result.stderr and KEY not in result.stderr
    assert not (tmp_path / "out").exists()
