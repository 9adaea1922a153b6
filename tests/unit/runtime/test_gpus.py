"""A GPU's context, made before torch is there."""

import subprocess
import sys

import pytest
from conftest import ROOT

CONTEXT = """
import ctypes
from hunyuan_staged.runtime import gpus
assert gpus.open_context(0)
driver, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
assert not driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))
import torch
print(active.value, torch.ones(3, device="cuda").sum().item())
"""
STAGE = """
import sys
import {script}
import utils
utils.begin_context = lambda rank: print(rank, "torch" in sys.modules, flush=True)
sys.exit({script}.main({flags}))
"""


def said(program: str) -> tuple[str, int]:
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    return result.stdout, result.returncode


def test_without_a_driver_there_is_no_context():
    """What that means for the run, torch says."""
    program = "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
    program += "from hunyuan_staged.runtime import gpus; print(gpus.open_context(0)); gpus.begin_context(0)"
    assert said(program) == ("False\n", 0)


@pytest.mark.gpu
def test_torch_takes_the_context_that_is_there():
    assert said(CONTEXT) == ("1 3.0\n", 0)


@pytest.mark.parametrize("script", ["stage1_text_encoder", "stage2_transformer", "stage3_vae_decoder"])
def test_a_stage_begins_its_context_before_it_imports_torch(tmp_path, script):
    """Neither a plan nor flags that are refused begin any."""
    folder = ["--output_dir" if script.startswith("stage1") else "--input_dir", str(tmp_path / "none")]
    if script.startswith("stage1"):
        folder += ["--model_path", str(tmp_path / "nothing")]
    assert said(STAGE.format(script=script, flags=folder)) == ("0 False\n", 2)
    assert said(STAGE.format(script=script, flags=[*folder, "--dry_run", "--debug"]))[0].count("False") == 0
    assert said(STAGE.format(script=script, flags=[*folder, "--log_json", str(tmp_path)])) == ("", 2)
