"""What the stages import, through the scripts themselves: start-up is half of a short run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from folders import embed

from hunyuan_staged.models.blocks import feed_forward
from hunyuan_staged.models.layers import FeedForward
from hunyuan_staged.weights.quantization import fp8_rows

# diffusers and transformers take seconds; torch._dynamo, torch's compiler, as well, and it brings sympy.
HEAVY = ["diffusers", "transformers", "torch._dynamo", "torch._inductor", "sympy"]
MODELLING = ["diffusers", "transformers.modeling_utils", "torch._dynamo", "sympy", "scipy"]
RUN = """
import atexit, json, pathlib, runpy, sys
report, script, heavy = pathlib.Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
atexit.register(lambda: report.write_text(json.dumps([name for name in heavy if name in sys.modules])))
sys.argv = [script, *sys.argv[4:]]
sys.path.insert(0, str(pathlib.Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


def imported_by(script: str, *flags: object, report: Path, among: list[str] = HEAVY) -> list[str]:
    """What of these is there when a stage has done its work."""
    command = [sys.executable, "-c", RUN, report, ROOT / script, json.dumps(among), *flags]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def done(tiny_official, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder that stage 2 has worked in, and what that imported."""
    folder = embed(tmp_path_factory.mktemp("imports"), tiny_official)
    flags = ["--input_dir", folder, "--video_length", "9", "--num_inference_steps", "2"]
    return folder, imported_by("stage2_transformer.py", *flags, report=folder / "imported.json")


def test_stage_2_imports_no_diffusers_and_no_compiler(done):
    folder, imported = done
    assert (folder / "stage2_latents.safetensors").is_file()
    assert imported == []


@pytest.mark.parametrize("flags", [["--weights_dtype", "fp8"], ["--enable_cache"], ["--offload_blocks", "1"]])
def test_nor_does_it_with_float8_a_cache_or_offloading(done, tmp_path, flags):
    flags += ["--output_dir", tmp_path, "--video_length", "9", "--num_inference_steps", "3"]
    report = tmp_path / "imported.json"
    assert imported_by("stage2_transformer.py", "--input_dir", done[0], *flags, report=report) == []


def test_stage_1_imports_no_modelling_of_transformers_for_text(tiny_official, tmp_path):
    """Its tokenizers and configs are all that is wanted of it; a prompt with quoted text needs T5, too."""
    flags = ["--model_path", tiny_official, "--prompt", "a red circle", "--output_dir", tmp_path]
    report = tmp_path / "imported.json"
    assert imported_by("stage1_text_encoder.py", *flags, report=report, among=MODELLING) == []
    assert (tmp_path / "stage1_embeddings.safetensors").is_file()


def test_stage_3_imports_no_diffusers_and_no_compiler(done, tmp_path):
    assert imported_by("stage3_vae_decoder.py", "--input_dir", done[0], report=tmp_path / "imported.json") == []
    assert (done[0] / "output_video.mp4").is_file()


def test_a_stage_that_imports_one_is_found_out(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sympy\n")
    assert imported_by(script, report=tmp_path / "imported.json") == ["sympy"]


def test_a_compiler_sees_operations_that_eager_calls_pass_by():
    """Otherwise it would take them apart."""
    torch.manual_seed(0)
    layer = FeedForward(8, 2.0, activation="gelu").requires_grad_(False)
    fp8_rows.quantise_linears(torch.nn.ModuleList([layer]))
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = torch.randn(1, 5, 8)
    compiled = torch.compile(feed_forward, backend=backend, fullgraph=True)(layer, x)
    assert torch.equal(compiled, feed_forward(layer, x))
    assert [name for name in seen if name.startswith("hunyuan_staged")] == [
        "hunyuan_staged.dequantise.default",
        "hunyuan_staged.linear_gelu.default",
        "hunyuan_staged.dequantise.default",
    ]
