"""safetensors files → the parameters of a module on a device, without a second copy."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.weights import stream
from hunyuan_staged.weights.boundary import read_json, require_regular
from hunyuan_staged.weights.key_maps import Named, refuse_names
from hunyuan_staged.weights.quantization.stored import FLOAT8, KEPT

Progress = Callable[..., Iterable[Any]]

# The names that weights go by in a part's folder; with .index.json behind them they are sharded.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
MAPPED_BYTES = 2**30
# The dtypes that weights may have, as a file's header names them; others would be converted without a word.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a part: the shards that an index lists, else the only file.

    Files of other names (an fp16 variant, say) count only where there is none of the usual name. Raises InputError
    where no weights are found, a listed shard is absent, or it is unclear which files belong together.
    """
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.exists():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
                raise InputError(f"{index} has no weight_map from tensors to files")
            files = [folder / Path(shard).name for shard in sorted(set(listed.values()))]
            refuse_names(
                f"{folder} lacks shards that its index lists", [path.name for path in files if not path.exists()]
            )
            return [require_regular(path) for path in files]
        if (folder / name).exists():
            return [require_regular(folder / name)]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        expected = " or ".join(WEIGHTS)
        raise InputError(f"{folder} holds {len(files)} safetensors files; expected {expected}, alone or with its index")
    return [require_regular(files[0])]


def has_weights(folder: Path) -> bool:
    """Whether a part's weights are there; of a hub repository they may be still to come."""
    try:
        return bool(weight_files(folder))
    except InputError:
        return False


def sharded_file(folder: Path, tensor: str) -> str:
    """The name of the file that holds a tensor: the one that the index names, else the usual one."""
    index = folder / f"{WEIGHTS[0]}.index.json"
    if not index.exists():
        return WEIGHTS[0]
    return Path(str((read_json(index).get("weight_map") or {}).get(tensor, WEIGHTS[0]))).name


def _read_ahead(path: Path, start: int, length: int) -> None:
    """Have the kernel read a part of a file into its cache; past the end, and where it takes no advice, nothing."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def read_tensors(
    files: Iterable[Path],
    wanted: Callable[[str], bool],
    device: torch.device,
    stays_on_host: Callable[[str], bool] = lambda _: False,
    dtypes: Collection[str] = FLOATS,
) -> Iterator[Named]:
    """The tensors of safetensors files whose names are wanted, straight onto a device, a GPU by many threads.

    Those that stay on the host, and on a CPU all, lie in the file's memory map; assign_weights copies them out of it. What
    has been read of a map stays resident until it is closed, so a file is opened anew after every MAPPED_BYTES. The disk
    works ahead by as much, on a thread of its own. Raises InputError for a file that is none, and for other dtypes
    than these, as a file calls them.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    try:
        for path in files:
            read = 0
            require_regular(path)
            try:
                with safe_open(path, "pt") as file:
                    names = [name for name in file.keys() if wanted(name)]  # noqa: SIM118 (no iterator)
                    for name in names:
                        require_float(f"{path}: {name}", file.get_slice(name).get_dtype(), dtypes)
                mapped = [name for name in names if device.type == "cpu" or stays_on_host(name)]
                sent = set(names) - set(mapped)
                if sent:
                    yield from stream.tensors(path, sent, device)
                while mapped:
                    # The tensors lie in about the order of their names.
                    thread.submit(_read_ahead, path, read, 2 * MAPPED_BYTES)
                    unread = MAPPED_BYTES
                    with safe_open(path, "pt") as file:
                        while mapped and unread > 0:
                            name = mapped.pop(0)
                            tensor = file.get_tensor(name)
                            unread -= tensor.nbytes
                            read += tensor.nbytes
                            yield name, tensor
            except InputError:
                raise
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{path} is not a whole safetensors file ({error})") from error
    finally:
        # Nobody waits for it: what is left of this after a refusal may be cleared away on that very thread.
        thread.shutdown(wait=False, cancel_futures=True)


def require_float(what: str, dtype: str, allowed: Collection[str] = FLOATS) -> None:
    if dtype not in allowed:
        raise InputError(f"{what} is {dtype}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class Destinations:
    """Where some tensors go instead of the module's own place on the device.

    tensors: memory that tensors of the module are to lie in, by name; fill: by this process, or by another one. consumed:
    the shapes, by name, of tensors that the module does not have: take(name, tensor) gets each, on the device and in the
    run's dtype, as soon as it is there, and nothing else keeps it.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fill: bool = True
    consumed: Mapping[str, torch.Size] = field(default_factory=dict)
    take: Callable[[str, torch.Tensor], None] = lambda name, tensor: None


NO_DESTINATIONS = Destinations()


def assign_weights(
    module: nn.Module,
    tensors: Iterable[Named],
    dtype: torch.dtype,
    device: torch.device,
    origin: Path,
    destinations: Destinations = NO_DESTINATIONS,
) -> nn.Module:
    """Put named tensors in the place of a meta module's parameters, one by one, each in `dtype`, without gradients.

    Tensors of the module that are in float8 stay so; those that have a place of their own go there, the others to the
    device, and those that are consumed to their consumer. Returns the module, in eval mode. InputError names what `origin`
    holds too much, what it lacks, the first tensor of another shape, and those that hold NaN or Inf.
    """
    state = module.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()} | dict(destinations.consumed)
    missing = dict.fromkeys(shapes)
    leftover = []
    finite: dict[str, torch.Tensor] = {}

    def put(name: str, value: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
        missing.pop(name, None)

    if not destinations.fill:
        for name, place in destinations.tensors.items():
            put(name, place)
    for name, tensor in tensors:
        if name not in shapes:
            leftover.append(name)
            continue
        if tensor.shape != shapes[name]:
            raise InputError(f"{origin}: {name} has shape {list(tensor.shape)}; its config says {list(shapes[name])}")
        if name in destinations.tensors:
            put(name, destinations.tensors[name].copy_(tensor))
            finite[name] = are_finite(destinations.tensors[name])
            continue
        # Out of the file's map, or of the fused tensor: kernels round differently by how a tensor is aligned.
        copy = device.type == "cpu" or tensor.untyped_storage().nbytes() != tensor.nbytes
        if name in destinations.consumed:
            value = tensor.to(device, dtype, copy=copy)
            finite[name] = are_finite(value)
            destinations.take(name, value)
            missing.pop(name, None)
            continue
        stored = tensor.dtype if state[name].dtype in KEPT else dtype
        value = tensor.to(device, stored, copy=copy)
        put(name, value)
        finite[name] = are_finite(value)
    refuse_names(f"{origin} holds tensors that the model does not have", leftover)
    refuse_names(f"{origin} lacks tensors of the model", list(missing))
    refuse_names(f"{origin} holds NaN or Inf, in {dtype}, in", _untrue(finite))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer that no file holds must be made anew"
    return module.eval()


def _untrue(answers: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the answers [] that are False. Asked at once, so that a GPU is waited for but once."""
    places: dict[torch.device, list[str]] = {}
    for name, answer in answers.items():
        places.setdefault(answer.device, []).append(name)
    true: dict[str, bool] = {}
    for names in places.values():
        true |= dict(zip(names, torch.stack([answers[name] for name in names]).tolist(), strict=True))
    return [name for name in answers if not true[name]]


def are_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether all numbers of a tensor are finite, as a tensor [] on its device; without a mask as large as the tensor."""
    if not values.numel():
        return torch.tensor(True)
    if values.dtype == torch.uint8:  # whose reader has looked at it
        return torch.tensor(True)
    if values.dtype == FLOAT8:  # which has no Inf, and whose NaN is all ones behind the sign
        return (values.view(torch.uint8) & 0x7F).max() != 0x7F
    least, largest = torch.aminmax(values)
    return torch.isfinite(least) & torch.isfinite(largest)


def tensor_shape(path: Path, name: str) -> list[int] | None:
    """The shape of a tensor of a safetensors file, which is not read; None where it is not in it."""
    require_regular(path)
    try:
        with safe_open(path, "pt") as file:
            return list(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error
