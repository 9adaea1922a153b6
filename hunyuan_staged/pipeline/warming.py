"""What stages 2 and 3 do while the one before them works: imports, and on a large GPU its context, first kernels, weights.

No number follows from any of it. What cannot be done early is done in the stage's turn, where its failure is reported.
"""

from collections.abc import Callable, Iterable
from importlib import import_module

from hunyuan_staged.attention import kernel_cache, modes
from hunyuan_staged.attention.packages import FLASH4_PACKAGE, HOPPER, installed, obstacle
from hunyuan_staged.errors import InputError
from hunyuan_staged.files import video
from hunyuan_staged.memory.budget import CARD_OVERHEAD
from hunyuan_staged.options import DecodeOptions, DenoiseOptions, needs_compiler
from hunyuan_staged.parallel.environment import rank_info
from hunyuan_staged.parsing import options_of_run
from hunyuan_staged.runtime.environment import NOTHING_EARLY, Early, IsDue, imports_end, run_flags
from hunyuan_staged.runtime.gpus import GpuFacts, gpu_facts

WORLD = "hunyuan_staged.parallel.world"
DENOISING = (
    WORLD,
    *(
        f"hunyuan_staged.pipeline.{name}"
        for name in ("denoising", "denoising_records", "denoisers", "jobs", "previews", "upscaling")
    ),
    *(f"hunyuan_staged.sampling.{name}" for name in ("callbacks", "preview_writer", "state")),
)
# What torch.compile imports when it is first called.
COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codecache", "triton")
KERNELS = ("hunyuan_staged.models.block_kernels",)
DECODING = (
    WORLD,
    *(f"hunyuan_staged.pipeline.{name}" for name in ("decoding", "decoding_records", "loaded_decoder")),
)
# A context takes about 0.5 GB of a GPU, which stage 1 may need on a small one.
AMPLE_BYTES = 40 * 2**30


def warm_denoising(options: DenoiseOptions, is_due: IsDue) -> Early:
    """What stage 2 can do before its turn."""
    _import(DENOISING)
    gpu = None if options.dry_run else _own_gpu()
    if gpu is None:
        return NOTHING_EARLY

    def import_kernels() -> None:
        if needs_compiler(options):
            _import(COMPILER)
        elif installed("triton"):
            _import(KERNELS)
        if gpu.capability >= HOPPER and may_take_flash4(options):
            kernel_cache.keep_flash4_kernels()
            obstacle(FLASH4_PACKAGE)  # imports it; what is wrong with it is said by who asks next

    if not has_room(gpu):
        import_kernels()
    early = _load(gpu, is_due, import_kernels)
    import_kernels()  # unless they were imported beside the loading
    return early


def warm_decoding(options: DecodeOptions, is_due: IsDue) -> Early:
    """What stage 3 can do before its turn."""
    _import(DECODING)
    if not options.dry_run:
        video.begin_trial(options.video_encoder)
    gpu = None if options.dry_run else _own_gpu()
    if gpu is None:
        return NOTHING_EARLY
    _import(("hunyuan_staged.models.vae_kernels",))
    return _load(gpu, is_due)


def _import(names: Iterable[str]) -> None:
    for name in names:
        import_module(name)


def may_take_flash4(options: DenoiseOptions) -> bool:
    """Whether some block of a run may run flash-attn-4."""
    try:
        mode = options.attention_mode()
    except InputError:  # which the stage reports
        return False
    return mode in (modes.DEFAULT_ATTN_MODE, modes.SPARSE_ATTN_MODE, "flash4", "sageattn")


def _own_gpu() -> GpuFacts | None:
    """The GPU that this process is going to take, if any."""
    try:
        index = rank_info().local_rank
    except InputError:  # which the stage reports
        return None
    gpus = gpu_facts()
    return gpus[index % len(gpus)] if gpus else None


def has_room(gpu: GpuFacts) -> bool:
    """Whether a stage that waits may take a little of the GPU's memory."""
    return gpu.shared and gpu.total >= AMPLE_BYTES


def _load(gpu: GpuFacts, is_due: IsDue, imports: Callable[[], object] = bool) -> Early:
    """Make the GPU's context and that of its matrix products, and load what is known, where there is room beside the stage
    that works; else have the weights read into the host's cache."""
    import torch

    if not torch.cuda.is_available():
        return NOTHING_EARLY
    imports_end()
    room = has_room(gpu)
    if room:
        torch.cuda.set_device(gpu.index)
        x = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
        torch.mm(x, x)
        torch.cuda.synchronize()
    told = run_flags()
    if told is None:
        return NOTHING_EARLY
    from hunyuan_staged.pipeline import early

    own, options = told[0], options_of_run(told[1])
    if room:
        return early.load_early(options, own, is_due, torch.device("cuda", gpu.index), imports)
    return early.read_early(options, own, is_due, (gpu.total - CARD_OVERHEAD, gpu.capability))
