"""What a stage does before its turn."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from hunyuan_staged.options import DecodeOptions, DenoiseOptions, needs_compiler
from hunyuan_staged.pipeline import warming
from hunyuan_staged.runtime.environment import Early
from hunyuan_staged.runtime.gpus import GpuFacts, gpu_facts

WITHOUT_GPU = """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""
from hunyuan_staged.options import {options}
from hunyuan_staged.pipeline import warming
warming.{warm}({options}(), lambda: False)
print(*(name for name in ("hunyuan_staged.pipeline.{module}", "torch._dynamo", "transformers") if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("options", "warm", "module"),
    [("DenoiseOptions", "warm_denoising", "denoising"), ("DecodeOptions", "warm_decoding", "decoding")],
)
def test_without_a_gpu_the_stage_is_imported_and_no_compiler(options, warm, module):
    program = WITHOUT_GPU.format(options=options, warm=warm, module=module)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == (f"hunyuan_staged.pipeline.{module}\n", 0), result.stderr


@pytest.mark.parametrize(
    ("flags", "takes"),
    [
        ({}, True),
        ({"attn_mode": "cudnn"}, False),
        ({"use_sageattn": True}, True),
        ({"use_sageattn": True, "attn_mode": "torch"}, False),  # which stage 2 refuses
    ],
)
def test_flash4_is_imported_where_a_run_may_take_it(flags, takes):
    assert warming.may_take_flash4(DenoiseOptions(**flags)) is takes


@pytest.mark.parametrize(
    ("total", "shared", "room"), [(80 * 2**30, True, True), (24 * 2**30, True, False), (80 * 2**30, False, False)]
)
def test_a_context_is_made_early_where_there_is_room_and_the_gpu_is_shared(total, shared, room):
    assert warming.has_room(GpuFacts(0, total, (9, 0), shared)) is room


@pytest.mark.parametrize("rank", ["", "two"])
def test_what_is_wrong_with_the_environment_is_left_to_the_stage(monkeypatch, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert warming.warm_decoding(DecodeOptions(), lambda: False) == Early()


@pytest.mark.gpu
def test_the_driver_and_torch_see_the_same_gpus():
    assert [(gpu.total, gpu.capability) for gpu in gpu_facts()] == [
        (properties.total_memory, (properties.major, properties.minor))
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


@pytest.mark.parametrize(
    ("flags", "compiled"),
    [({}, False), ({"compile": True}, True), ({"weights_dtype": "fp8"}, False), ({"fp8_matmul": True}, True)],
)
def test_products_in_float8_take_the_compiler(flags, compiled):
    assert needs_compiler(DenoiseOptions(**flags)) is compiled
