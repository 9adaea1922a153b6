"""A table of bad inputs through the scripts: each is one line that names the culprit, status 2, and changes nothing."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from folders import embed
from forked import run_stage
from PIL import Image
from safetensors.torch import load_file, save_file

from hunyuan_staged.errors import InputError
from hunyuan_staged.files import contract
from hunyuan_staged.files.config import CONFIG_KEYS, NUMBER, read_config
from hunyuan_staged.files.tensors import save_latents

CONFIG, EMBEDDINGS, LATENTS = contract.CONFIG_FILE, contract.EMBEDDINGS_FILE, contract.LATENTS_FILE
SMALL = ["--video_length", "5", "--num_inference_steps", "2"]
LONG = "x" * 250

# Flags: (stage, arguments, a part of the message). {dir} is the folder of the run.
FLAGS = [
    (1, ["--prompt"], "argument --prompt: expected one argument"),
    (1, ["--prompt", "caf\udce9"], "is not UTF-8 text"),
    (1, ["--resolution", "4k"], "--resolution '4k' is unknown; known: demo, 360p, 480p, 720p, 1080p"),
    (1, ["--resolution", "720P"], "--resolution '720P' is unknown"),
    (1, ["--cfg_distilled"], "has no transformer demo_t2v_distilled; it holds demo_i2v, demo_t2v"),
    (1, ["--step_distilled", "--sparse_attn"], "--step_distilled excludes --cfg_distilled and --sparse_attn"),
    (1, ["--dtype", "fp16"], "argument --dtype: invalid choice: 'fp16'"),
    (1, ["--image_path", "nowhere.png"], "--image_path nowhere.png does not exist"),
    (1, ["--image_path", "{dir}"], "run is no file"),
    (1, ["--image_path", "{dir}/text.png"], "text.png: not an image that Pillow can open"),
    (1, ["--image_path", "{dir}/cut.png"], "cut.png: cannot be read"),
    (1, ["--image_path", "{dir}/strip.png"], "strip.png: 400x4 is a strip; at most 32:1 is allowed"),
    (1, ["--output_dir", "{dir}/text.png"], "text.png is not a folder"),
    (1, ["--output_dir", "{dir}/text.png/a/b"], "text.png is not a folder"),
    (1, ["--output_dir", f"{{dir}}/{LONG}{LONG}"], "File name too long"),
    (
        1,
        ["--rewrite", "http://127.0.0.1:9/v1", "--rewrite_model", "m", "--rewrite_instructions", "{dir}"],
        "run is no file",
    ),
    (1, ["--model_path", "{dir}"], "is no model folder"),
    (1, ["--model_path", "{dir}/text.png"], "text.png is not a whole safetensors file"),
    (1, ["--model_path", "no/such/model/at/all"], "no/such/model/at/all does not exist, and it is no hub id"),
    (1, ["--model_path", "~nobody-of-that-name/x"], "~nobody-of-that-name/x"),
    (1, ["--model_path", "../../../etc/passwd"], "../../../etc/passwd"),
    (1, ["--model_path", ""], "--model_path is empty"),
    (1, ["--sede", "4"], "unrecognized arguments: --sede 4"),
    (1, ["--seed", "4"], "unrecognized arguments: --seed 4"),
    (2, ["--video_length", "0"], "--video_length 0 is not 4n+1; the nearest are 1 and 5"),
    (2, ["--video_length", "-3"], "--video_length -3 is not 4n+1"),
    (2, ["--video_length", "50"], "--video_length 50 is not 4n+1; the nearest are 49 and 53"),
    (2, ["--video_length", "4001"], "--video_length 4001 is more than 2401"),
    (2, ["--video_length", "5.0"], "argument --video_length: invalid int value: '5.0'"),
    (2, ["--video_length", "9" * 5000], "argument --video_length: invalid int value"),
    (2, ["--aspect_ratio", "16/9"], "--aspect_ratio '16/9' is not width:height"),
    (2, ["--aspect_ratio", "5:1"], "--aspect_ratio 5:1 is outside 1:4 to 4:1"),
    (2, ["--aspect_ratio", "1:4.1"], "--aspect_ratio 1:4.1 is outside 1:4 to 4:1"),
    (2, ["--aspect_ratio", "-16:9"], "--aspect_ratio"),
    (2, ["--aspect_ratio", "1e308:1e-308"], "--aspect_ratio 1e308:1e-308 is outside"),
    (2, ["--num_inference_steps", "-1"], "--num_inference_steps -1 is not a positive number"),
    (2, ["--num_inference_steps", "1001"], "--num_inference_steps 1001 is more than 1000"),
    (2, ["--num_inference_steps", "many"], "argument --num_inference_steps: invalid int value: 'many'"),
    (2, ["--guidance_scale", "0"], "--guidance_scale 0.0 is outside 1 to 100"),
    (2, ["--guidance_scale", "100"], "--guidance_scale 100.0 is outside 1 to 100"),
    (2, ["--guidance_scale", "inf"], "--guidance_scale inf is outside 1 to 100"),
    (2, ["--guidance_scale", "-nan"], "--guidance_scale"),
    (2, ["--seed", str(2**64)], f"--seed {2**64} is outside 0 to 2^64 - 1"),
    (2, ["--seed", "1.5"], "argument --seed: invalid int value: '1.5'"),
    (2, ["--dtype", "float32"], "argument --dtype: invalid choice: 'float32'"),
    (2, ["--attn_mode", "sdpa"], "argument --attn_mode: invalid choice: 'sdpa'"),
    (2, ["--checkpoint_every", "-1"], "--checkpoint_every -1 is neither 0 (never) nor a number of steps"),
    (2, ["--checkpoint_every", "often"], "argument --checkpoint_every: invalid int value: 'often'"),
    (2, ["--resume", "yes"], "unrecognized arguments: yes"),
    (2, ["--enable_offloading", "--disable_offloading"], "not allowed with argument"),
    (2, ["--input_dir", "{dir}/nowhere"], "nowhere does not exist; run stage1_text_encoder.py first"),
    (2, ["--input_dir", "{dir}/text.png", "--output_dir", "{dir}/o"], "text.png is not a folder"),
    (2, ["--input_dir", ""], "--input_dir is empty"),
    (2, ["--output_dir", "{dir}/text.png"], "text.png is not a folder"),
    (2, ["--model_path", "{dir}/nowhere"], "nowhere"),
    (3, ["--fps", "-24"], "--fps -24 is outside 1 to 240"),
    (3, ["--fps", "241"], "--fps 241 is outside 1 to 240"),
    (3, ["--fps", "inf"], "--fps inf is outside 1 to 240"),
    (3, ["--fps", "24p"], "argument --fps: invalid float value: '24p'"),
    (3, ["--tile_size", "0"], "--tile_size 0 is not a positive multiple of 16 px"),
    (3, ["--tile_size", "250"], "--tile_size 250 is not a positive multiple of 16 px"),
    (3, ["--tile_size", "-256"], "--tile_size -256 is not a positive multiple of 16 px"),
    (3, ["--tile_size", "16000"], "--tile_size 16000 is more than 8192 px"),
    (3, ["--tile_size", "64", "--disable_tiling"], "--disable_tiling and --tile_size contradict each other"),
    (3, ["--tile_overlap", "-0.1"], "--tile_overlap -0.1 is outside 0 to 0.5"),
    (3, ["--tile_overlap", "nan"], "--tile_overlap nan is outside 0 to 0.5"),
    (3, ["--tile_size", "16", "--tile_overlap", "0.5"], "leaves no step between tiles"),
    (3, ["--output_video", "{dir}/a.avi"], "a.avi is not the name of an .mp4 file or a .gif"),
    (3, ["--encoder", "hevc"], "argument --encoder: invalid choice"),
    (3, ["--encoder_preset", "p4"], "--encoder_preset p4 is none of libx264's: ultrafast"),
    (3, ["--crf", "52"], "--crf 52 is outside 0 to 51"),
    (3, ["--output_video", "{dir}"], "is not the name of an .mp4 file or a .gif"),
    (3, ["--output_video", ""], "--output_video is empty"),
    (3, ["--model_path", "m" * 5000], "File name too long"),
    (3, ["--output_video", "{dir}/none/a.mp4"], "none does not exist"),
    (3, ["--output_video", "{dir}/a.mp4", "--seeds", "1-2"], "--output_video names one video, and --seeds makes many"),
    (3, ["--watch", "{dir}", "--dry_run"], "--watch excludes --dry_run"),
    (3, ["--output_video", "{dir}/text.png/a.mp4"], "text.png is not a folder"),
    (3, ["--output_video", f"{{dir}}/{LONG}.mp4"], "is a name of more than 200 bytes"),
    (3, ["--input_dir", "{dir}/nowhere"], "nowhere does not exist; run stage2_transformer.py first"),
    (3, ["--model_path", "{dir}"], "is no model folder"),
    (3, ["--save_frames=yes"], "argument --save_frames: ignored explicit argument 'yes'"),
]


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with this content."""
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def config(**entries: object) -> Callable[[Path], None]:
    """The config with some of its entries changed; those that are ... are dropped."""

    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text()) | entries
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return change


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Callable[[Path], None]:
    """A safetensors file with its tensors changed in place."""

    def rewrite(folder: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / file, metadata or None)

    return rewrite


def cut(file: str, keep: float) -> Callable[[Path], None]:
    """The beginning of a file."""

    def shorten(folder: Path) -> None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: int(len(whole) * keep)])

    return shorten


def header(content: object, data: bytes = b"") -> bytes:
    """A safetensors file by hand."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def folder_instead(name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


def poke(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """One number of a tensor."""
    return lambda content: content[name].view(-1)[0].fill_(value)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content.update({name: change(content[name])})


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda content: content.pop(name)


# Files: (stage, what is done to the folder, a part of the message).
FILES = [
    (2, text(CONFIG, ""), f"{CONFIG} is not JSON"),
    (2, text(CONFIG, '{"prompt": "a"'), f"{CONFIG} is not JSON"),
    (2, text(CONFIG, b"\xff\xfe{}"), f"{CONFIG} is not JSON"),
    (2, text(CONFIG, "[" * 100_000), f"{CONFIG} is not JSON"),
    (2, text(CONFIG, '{"a":' * 50_000), f"{CONFIG} is not JSON"),
    (2, text(CONFIG, '{"seed": ' + "9" * 5000 + "}"), f"{CONFIG} is not JSON"),
    (2, text(CONFIG, '{"guidance_scale": NaN}'), "NaN is not a number that JSON has"),
    (2, text(CONFIG, '{"guidance_scale": 1e999}'), "guidance_scale is inf; allowed is a number"),
    (2, text(CONFIG, "[]"), f"{CONFIG} holds a JSON list, not an object"),
    (2, text(CONFIG, '"prompt"'), f"{CONFIG} holds a JSON str, not an object"),
    (2, text(CONFIG, '{"prompt": "' + "x" * 2**20 + '"}'), "at most 1048576 are allowed"),
    (2, text(CONFIG, '{"prompt": "\\ud800"}'), "prompt is not UTF-8 text"),
    (2, config(sede=4), "'sede' is unknown; known: prompt, negative_prompt, model_path"),
    (2, config(**{"\x1b[31m": 4}), "'\\x1b[31m' is unknown"),
    (2, config(prompt=5), "prompt is 5; allowed is text"),
    (2, config(model_path=["a"]), "model_path is ['a']; allowed is text"),
    (2, config(model_path=...), "records no model_path; give --model_path"),
    (2, config(model_path=None), "records no model_path; give --model_path"),
    (2, config(model_path="a\0b"), "a\\x00b does not exist"),
    (2, config(transformer_version=7), "transformer_version is 7; allowed is text"),
    (2, config(transformer_version="720p"), "transformer version '720p' is not of the form"),
    (2, config(transformer_version="../../x"), "transformer version '../../x' is not of the form"),
    (2, config(transformer_version=...), "does not say which one to take"),
    (2, config(transformer_version="demo_i2v"), "demo_i2v makes videos from an image, and the embeddings hold none"),
    (2, config(dtype="int4"), "dtype 'int4' is unknown; known: bf16, fp32, auto"),
    (2, config(seed=True), "seed is True; allowed is a whole number"),
    (2, config(seed=1.5), "seed is 1.5; allowed is a whole number"),
    (2, config(height={"a": 1}), "height is {'a': 1}; allowed is a whole number"),
    (2, lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} does not exist; run stage1_text_encoder.py first"),
    (2, folder_instead(CONFIG), f"{CONFIG} is not a file"),
    (2, lambda folder: (folder / EMBEDDINGS).unlink(), f"{EMBEDDINGS} does not exist; run stage1_text_encoder.py"),
    (2, folder_instead(EMBEDDINGS), f"{EMBEDDINGS} is not a file"),
    (2, cut(EMBEDDINGS, 0), f"{EMBEDDINGS} is not a whole safetensors file"),
    (2, cut(EMBEDDINGS, 0.0001), f"{EMBEDDINGS} is not a whole safetensors file"),
    (2, cut(EMBEDDINGS, 0.99), f"{EMBEDDINGS} is not a whole safetensors file"),
    (2, text(EMBEDDINGS, header({})), f"{EMBEDDINGS} lacks prompt_embeds, "),
    (2, text(EMBEDDINGS, b"\xff" * 100), f"{EMBEDDINGS} is not a whole safetensors file"),
    (2, text(EMBEDDINGS, header(b"[" * 100_000)), f"{EMBEDDINGS} is not a whole safetensors file"),
    (2, tensors(EMBEDDINGS, drop("prompt_embeds_2")), f"{EMBEDDINGS} lacks prompt_embeds_2"),
    (2, tensors(EMBEDDINGS, lambda t: t.update(extra=torch.ones(1))), "holds unknown tensors extra"),
    (2, tensors(EMBEDDINGS, poke("prompt_embeds", float("nan"))), "prompt_embeds holds NaN or Inf"),
    (2, tensors(EMBEDDINGS, poke("negative_prompt_embeds_2", float("inf"))), "negative_prompt_embeds_2 holds NaN or"),
    (2, tensors(EMBEDDINGS, put("prompt_embeds", lambda x: x.long())), "prompt_embeds is torch.int64; allowed are"),
    (2, tensors(EMBEDDINGS, put("prompt_embeds", lambda x: x[0])), "prompt_embeds has shape [1000, 64]; allowed is"),
    (2, tensors(EMBEDDINGS, put("prompt_embeds", lambda x: x[:, :9])), "prompt_embeds_mask has shape [1, 1000]"),
    (2, tensors(EMBEDDINGS, put("prompt_embeds_mask", lambda x: x * 0)), "prompt_embeds_mask marks no token"),
    (2, tensors(EMBEDDINGS, put("prompt_embeds_mask", lambda x: x * 2)), "holds other numbers than 0 and 1"),
    (
        2,
        tensors(
            EMBEDDINGS, lambda t: t.update({k: t[k][..., :8] for k in ("prompt_embeds", "negative_prompt_embeds")})
        ),
        "prompt_embeds is 8 wide, and the transformer demo_t2v takes 64; the embeddings belong to another model",
    ),
    (2, tensors(EMBEDDINGS, lambda t: None, dtype_info="{"), "its dtype_info is not a JSON object"),
    (
        2,
        tensors(EMBEDDINGS, lambda t: None, dtype_info='{"prompt_embeds": "float8"}'),
        "the dtype 'float8'; allowed are",
    ),
    (3, lambda folder: (folder / LATENTS).unlink(), f"{LATENTS} does not exist; run stage2_transformer.py first"),
    (3, cut(LATENTS, 0.5), f"{LATENTS} is not a whole safetensors file"),
    (3, text(LATENTS, "<html>404</html>"), f"{LATENTS} is not a whole safetensors file"),
    (3, tensors(LATENTS, poke("latents", float("nan"))), "latents holds NaN or Inf"),
    (3, tensors(LATENTS, put("latents", lambda x: x.int())), "latents is torch.int32; allowed are floating-point"),
    (3, tensors(LATENTS, put("latents", lambda x: x[:, :16])), "do not fit this VAE, which takes [1, 32, t, h, w]"),
    (
        3,
        tensors(LATENTS, put("latents", lambda x: x[0])),
        "latents has shape [32, 2, 6, 10]; allowed is [1, C, t, h, w]",
    ),
    (3, tensors(LATENTS, put("latents", lambda x: torch.cat([x, x]))), "latents has shape [2, 32, 2, 6, 10]"),
    (3, tensors(LATENTS, put("latents", lambda x: x[:, :, :0])), "latents has shape [1, 32, 0, 6, 10]"),
    (3, text(CONFIG, "{}"), "records no model_path; give --model_path"),
    (3, config(model_path="/nowhere/at/all"), "/nowhere/at/all does not exist"),
    (3, config(output_video=3), "output_video is 3; allowed is text"),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_official) -> Path:
    """A folder that all three stages could go on from, and a few files beside it that are no good."""
    folder = embed(tmp_path_factory.mktemp("template"), tiny_official)
    draw = torch.Generator().manual_seed(5)
    save_latents(folder, torch.randn(1, 32, 2, 6, 10, generator=draw), {"num_frames": "5"})
    (folder / "text.png").write_text("no image")
    Image.new("RGB", (400, 4)).save(folder / "strip.png")
    Image.new("RGB", (64, 64), "red").save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def refused(stage: int, args: list[str], folder: Path, message: str, tmp_path: Path) -> None:
    """A stage refuses in one line, and the folder is as it was."""
    before = contents(folder)
    status, said = run_stage(stage, *args, said=tmp_path / "said")
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert message in lines[0], lines[0]
    assert "Traceback" not in said
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said)
    assert not re.search(r"(?m)^loading ", said), "it is refused before any weights are read"
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "said"]


def base(stage: int, folder: Path, model: Path) -> list[str]:
    """Arguments with which a stage would go through."""
    if stage == 1:
        return ["--model_path", str(model), "--output_dir", str(folder)]
    return ["--input_dir", str(folder), *(SMALL if stage == 2 else [])]


def name_of(value: object) -> str:
    return re.sub(r"\W+", "_", str(value))[:40] if isinstance(value, (int, list)) else "" if callable(value) else "…"


@pytest.mark.parametrize(("stage", "args", "message"), FLAGS, ids=lambda value: name_of(value))
def test_bad_flags(template, tmp_path, tiny_official, stage, args, message):
    folder = shutil.copytree(template, tmp_path / "run")
    given = [arg.replace("{dir}", str(folder)) for arg in args]
    refused(stage, [*base(stage, folder, tiny_official), *given], folder, message, tmp_path)


@pytest.mark.parametrize(("stage", "change", "message"), FILES)
def test_bad_files(template, tmp_path, tiny_official, stage, change, message):
    folder = shutil.copytree(template, tmp_path / "run")
    change(folder)
    refused(stage, base(stage, folder, tiny_official), folder, message, tmp_path)


def model_config(path: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A config.json of the model with its entries changed in place."""

    def rewrite(model: Path) -> None:
        content = json.loads((model / path).read_text())
        change(content)
        (model / path).write_text(json.dumps(content))

    return rewrite


DIT, VAE = "transformer/demo_t2v", "vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = [
    (2, text(f"{DIT}/config.json", "{"), f"{DIT}/config.json is not JSON"),
    (2, text(f"{DIT}/config.json", "[" * 100_000), f"{DIT}/config.json is not JSON"),
    (2, model_config(f"{DIT}/config.json", lambda c: c.pop("heads_num")), "lacks: heads_num"),
    (2, model_config(f"{DIT}/config.json", lambda c: c.update(guidance_embed=True)), "guidance_embed is True"),
    (2, model_config(f"{DIT}/config.json", lambda c: c.update(heads_num="four")), "heads_num is 'four'; allowed is"),
    (2, model_config(f"{DIT}/config.json", lambda c: c.update(heads_num=0)), "heads_num is 0; allowed is a whole"),
    (2, model_config(f"{DIT}/config.json", lambda c: c.update(patch_size=1)), "patch_size is 1; allowed is [t, n, n]"),
    (2, cut(f"{DIT}/{WEIGHTS}", 0.5), f"{WEIGHTS} is not a whole safetensors file"),
    (2, lambda model: (model / DIT / WEIGHTS).unlink(), "holds 0 safetensors files"),
    (3, text(f"{VAE}/config.json", "null"), "vae/config.json holds a JSON NoneType, not an object"),
    (3, model_config(f"{VAE}/config.json", lambda c: c.pop("scaling_factor")), "lacks: scaling_factor"),
    (
        3,
        model_config(f"{VAE}/config.json", lambda c: c.update(block_out_channels="x")),
        "block_out_channels is 'x'; allowed is a list of 5 items",
    ),
    (3, cut(f"{VAE}/{WEIGHTS}", 0.9), f"{WEIGHTS} is not a whole safetensors file"),
    (1, text("text_encoder/llm/config.json", "{}"), "model_type is null; allowed are qwen2_5_vl"),
    (1, text("text_encoder/llm/tokenizer.json", "{}"), "holds no tokenizer that transformers can read"),
]


@pytest.mark.parametrize(("stage", "change", "message"), MODELS)
def test_bad_models(template, tmp_path_factory, tmp_path, tiny_official, stage, change, message):
    folder = shutil.copytree(template, tmp_path / "run")
    model = shutil.copytree(tiny_official, tmp_path_factory.mktemp("broken") / "model")
    change(model)
    before = contents(folder)
    args = [*base(stage, folder, model), *(["--model_path", str(model)] if stage > 1 else [])]
    status, said = run_stage(stage, *args, said=tmp_path / "said")
    assert status == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert message in lines[0], lines[0]
    assert "Traceback" not in said
    assert contents(folder) == before


OTHER_KINDS: dict[object, list[object]] = {
    str: [5, 1.5, True, ["a"], {}, "\ud800"],
    int: ["5", 1.5, True, [5], {}],
    NUMBER: ["5", True, [5], {}, float("inf")],
}


@pytest.mark.parametrize(("name", "kind"), [entry for keys in CONFIG_KEYS.values() for entry in keys.items()])
def test_no_entry_of_the_config_is_of_another_kind(tmp_path, name, kind):
    """Every key that there is, also one that is added."""
    for value in OTHER_KINDS[kind]:
        text = json.dumps({name: value}).replace("Infinity", "1e999")
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(InputError, match=rf"{CONFIG}: {name} is (.*; allowed is|not UTF-8 text)"):
            read_config(tmp_path)


def test_the_table_is_as_long_as_promised():
    promised = re.search(r"a table of (\d+) cases", (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8"))
    assert promised and len(FLAGS) + len(FILES) + len(MODELS) == int(promised[1])
