"""safetensors files → the parameters of a module on a device, without a second copy."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hunyuan_staged.errors import InputError
from hunyuan_staged.runtime.progress import quiet
from hunyuan_staged.weights.boundary import read_json, require_regular
from hunyuan_staged.weights.entries import entries
from hunyuan_staged.weights.key_maps import Named, refuse_names
from hunyuan_staged.weights.quantization.stored import FLOAT8, KEPT
from hunyuan_staged.weights.stream import FileReader, Place, nowhere

Progress = Callable[..., Iterable[Any]]
Adapt = Callable[[Iterable[Named]], Iterable[Named]]  # what adapters make of a model's tensors

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
    files: Sequence[Path],
    wanted: Callable[[str], bool],
    device: torch.device,
    stays_on_host: Callable[[str], bool] = lambda _: False,
    dtypes: Collection[str] = FLOATS,
    progress: Progress = quiet,
    place: Place = nowhere,
) -> Iterator[Named]:
    """The tensors of safetensors files whose names are wanted, straight onto a device, a GPU by many threads.

    Those that stay on the host, and on a CPU all, lie in the file's memory map; assign_weights copies them out of it. What
    has been read of a map stays resident until it is closed, so a file is opened anew after every MAPPED_BYTES. The disk
    works ahead by as much, on a thread of its own.

    Args:
        dtypes: that are allowed, as a file calls them.
        place: where on a GPU a tensor is to lie, as FileReader takes it.

    Raises InputError for a file that is none, and for other dtypes.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
    with ExitStack() as exits:
        # Nobody waits for it: what is left of this after a refusal may be cleared away on that very thread.
        exits.callback(thread.shutdown, wait=False, cancel_futures=True)
        sources, mapped = [], []
        for path in files:
            with _naming(path), safe_open(require_regular(path), "pt") as header:
                names = _checked_names(header, path, wanted, dtypes)
                on_host = [name for name in names if _stays_mapped(device) or stays_on_host(name)]
                sent = set(names) - set(on_host)
                if sent:
                    file = exits.enter_context(path.open("rb")).fileno()
                    sources.append((file, [entry for name, entry in entries(header, file).items() if name in sent]))
                else:
                    sources.append((-1, []))
                mapped.append(on_host)
        reader = exits.enter_context(FileReader(sources, device, place))
        for number, path in enumerate(progress(files)):
            with _naming(path):
                yield from reader.tensors(number)
                yield from _mapped_tensors(path, mapped[number], thread)


def _stays_mapped(device: torch.device) -> bool:
    """Whether nothing is gained by reading a file otherwise than by its map."""
    return device.type == "cpu"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Have errors name the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error


def _checked_names(header: Any, path: Path, wanted: Callable[[str], bool], dtypes: Collection[str]) -> list[str]:
    """The tensors of an open file that are wanted, all of allowed dtypes."""
    names = [name for name in header.keys() if wanted(name)]  # noqa: SIM118 (no iterator)
    for name in names:
        require_float(f"{path}: {name}", header.get_slice(name).get_dtype(), dtypes)
    return names


def _mapped_tensors(path: Path, names: list[str], thread: ThreadPoolExecutor) -> Iterator[Named]:
    """Tensors in the file's map."""
    read = 0
    while names:
        # The tensors lie in about the order of their names.
        thread.submit(_read_ahead, path, read, 2 * MAPPED_BYTES)
        unread = MAPPED_BYTES
        with safe_open(path, "pt") as file:
            while names and unread > 0:
                name = names.pop(0)
                tensor = file.get_tensor(name)
                unread -= tensor.nbytes
                read += tensor.nbytes
                yield name, tensor


def require_float(what: str, dtype: str, allowed: Collection[str] = FLOATS) -> None:
    if dtype not in allowed:
        raise InputError(f"{what} is {dtype}; allowed are {', '.join(allowed)}")


@dataclass(frozen=True)
class Destinations:
    """Where some tensors go instead of the module's own place on the device.

    tensors: memory that tensors of the module are to lie in, by name; fill: by this process, or by another one. memory: of
    other tensors on the device, in the run's dtype; what is in its place already is not copied. consumed: the shapes, by
    name, of tensors that the module does not have: take(name, tensor) gets each, on the device and in the run's dtype, as
    soon as it is there, and nothing else keeps it.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fill: bool = True
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)
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
    modules, missing = dict(module.named_modules(remove_duplicate=False)), dict.fromkeys(shapes)
    leftover = []
    bounds: dict[str, Sequence[torch.Tensor]] = {}

    def put(name: str, value: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        setattr(modules[path], leaf, nn.Parameter(value, requires_grad=False))
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
        own = destinations.tensors.get(name, destinations.memory.get(name))
        if own is not None:
            if tensor.data_ptr() != own.data_ptr():
                own.copy_(tensor)
            put(name, own)
            bounds[name] = finite_bounds(own)
            continue
        # Out of the file's map, or of the fused tensor: kernels round differently by how a tensor is aligned.
        copy = device.type == "cpu" or tensor.untyped_storage().nbytes() != tensor.nbytes
        if name in destinations.consumed:
            value = tensor.to(device, dtype, copy=copy)
            bounds[name] = finite_bounds(value)
            destinations.take(name, value)
            missing.pop(name, None)
            continue
        stored = tensor.dtype if state[name].dtype in KEPT else dtype
        value = tensor.to(device, stored, copy=copy)
        put(name, value)
        bounds[name] = finite_bounds(value)
    refuse_names(f"{origin} holds tensors that the model does not have", leftover)
    refuse_names(f"{origin} lacks tensors of the model", list(missing))
    refuse_names(f"{origin} holds NaN or Inf, in {dtype}, in", _not_finite(bounds))
    assert not any(buffer.is_meta for buffer in module.buffers()), "a buffer that no file holds must be made anew"
    return module.eval()


def _not_finite(bounds: Mapping[str, Sequence[torch.Tensor]]) -> list[str]:
    """The names whose numbers [] are not all finite. Asked at once, so that a GPU is waited for but once."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
    for name, numbers in bounds.items():
        for number in numbers:
            kinds.setdefault((number.device, number.dtype), []).append((name, number))
    found = set()
    for named in kinds.values():
        finite = torch.isfinite(torch.stack([number for _, number in named])).tolist()
        found |= {name for (name, _), fine in zip(named, finite, strict=True) if not fine}
    return [name for name in bounds if name in found]


def finite_bounds(values: torch.Tensor) -> Sequence[torch.Tensor]:
    """Numbers [] on a tensor's device that are finite where all of its own are; without a mask as large as the tensor."""
    if not values.numel() or values.dtype == torch.uint8:  # the reader of the latter has looked at it
        return ()
    if values.dtype == FLOAT8:  # which has no Inf, and whose NaN is all ones behind the sign
        return (1 / ((values.view(torch.uint8) & 0x7F).max() != 0x7F),)
    return torch.aminmax(values)


def tensor_shape(path: Path, name: str) -> list[int] | None:
    """The shape of a tensor of a safetensors file, which is not read; None where it is not in it."""
    require_regular(path)
    try:
        with safe_open(path, "pt") as file:
            return list(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error})") from error
