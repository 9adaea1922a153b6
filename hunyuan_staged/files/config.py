"""generation_config.json: which stage decides which key, reading and updating it."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hunyuan_staged.errors import InputError
from hunyuan_staged.files.atomic import replacing
from hunyuan_staged.files.contract import CONFIG_FILE, EMBEDDINGS_HASH, LATENTS_HASH, VIDEO_MADE_FROM, require_file

# Which stage decides which key of generation_config.json, and what its value is; any may be null. A stage that runs
# again replaces its own keys, no others.
NUMBER = (int, float)
LARGER_KEY = "super_resolution"  # what is to follow on the base run
CONFIG_KEYS: dict[int, dict[str, type | tuple[type, ...]]] = {
    1: {
        "prompt": str,
        "negative_prompt": str,
        "model_path": str,
        "text_encoder": str,
        "glyph_encoder": str,
        "vision_encoder": str,
        "vae": str,
        "resolution": str,
        LARGER_KEY: str,
        "super_resolution_transformer": str,
        "super_resolution_upsampler": str,
        "transformer_version": str,
        "task_type": str,
        "image_path": str,
        "dtype": str,
        EMBEDDINGS_HASH: str,
        "rewritten_prompt": str,
        "rewrite_model": str,
        "rewrite_sha256": str,
    },
    2: {
        "aspect_ratio": str,
        "video_length": int,
        "num_inference_steps": int,
        "guidance_scale": NUMBER,
        "flow_shift": NUMBER,
        "sigmas": str,
        "seed": int,
        "attn_mode": str,
        "weights_dtype": str,
        "fp8_matmul": str,
        "transformer_file": str,
        "transformer_file_version": str,
        "preset": str,
        "attn_schedule": str,
        "guidance": str,
        "cache": str,
        "lora": str,
        "height": int,
        "width": int,
        "stage2_elapsed_time": NUMBER,
    },
    3: {"stage3_decode_time": NUMBER, "output_video": str, LATENTS_HASH: str, VIDEO_MADE_FROM: str},
}
MAX_CONFIG_BYTES = 2**20
# How the TPU suite calls what we call otherwise.
SIBLING_KEYS = {"model_id": "model_path", "num_frames": "video_length"}


def read_config(folder: str | Path) -> dict[str, Any]:
    """generation_config.json of a folder, the TPU suite's keys under our names; keys that are missing stay so.

    Raises InputError where the folder or the file is absent, where the file is not a JSON object, and for a key that is
    unknown or has a value of the wrong kind.
    """
    path = Path(folder) / CONFIG_FILE
    require_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise InputError(f"{path} has {size} bytes; at most {MAX_CONFIG_BYTES} are allowed")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except InputError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds a JSON {type(config).__name__}, not an object")
    for theirs, ours in SIBLING_KEYS.items():
        if theirs in config:
            theirs_value = config.pop(theirs)
            config.setdefault(ours, theirs_value)
    known = {name: kind for keys in CONFIG_KEYS.values() for name, kind in keys.items()}
    for name, value in config.items():
        if name not in known:
            raise InputError(f"{path}: {name!a} is unknown; known: {', '.join((*known, *SIBLING_KEYS))}")
        _check_entry(path, name, value, known[name])
    return config


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON has")


def _check_entry(path: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> None:
    """InputError where an entry of the config is of another kind, or text that cannot be written as UTF-8."""
    # In Python a bool is an int.
    fits = isinstance(value, kind) and not isinstance(value, bool) and value not in (math.inf, -math.inf)
    if value is not None and not fits:
        wanted = {str: "text", int: "a whole number"}.get(kind, "a number") if isinstance(kind, type) else "a number"
        shown = ascii(value)
        raise InputError(f"{path}: {name} is {shown[:60]}{'…' * (len(shown) > 60)}; allowed is {wanted}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{path}: {name} is not UTF-8 text")


def update_config(folder: str | Path, additions: Mapping[str, Any], source: str | Path | None = None) -> Path:
    """Write one stage's keys into generation_config.json, and return its path. Other stages' keys stay as they are.

    Which stage it is follows from the keys (CONFIG_KEYS); what it wrote in an earlier run is dropped. source: the
    folder whose config is added to, where it is not `folder` itself. Raises InputError where that config is broken, or
    absent although the stage is not the first.
    """
    stages = [stage for stage, keys in CONFIG_KEYS.items() if additions.keys() <= keys.keys()]
    assert len(stages) == 1, f"no one stage decides {list(additions)}"
    source = Path(source or folder)
    first = stages[0] == 1 and not (source / CONFIG_FILE).is_file()
    kept = {} if first else {k: v for k, v in read_config(source).items() if k not in CONFIG_KEYS[stages[0]]}
    path = Path(folder) / CONFIG_FILE
    with replacing(path) as temporary:
        text = json.dumps({**kept, **additions}, indent=2, ensure_ascii=False)
        # JSON escapes what is below a space; the other control characters would act on a terminal that shows the file.
        text = re.sub(r"[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path
