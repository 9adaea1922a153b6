"""Which kernel a mode means, and what is refused."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hunyuan_staged.attention import choose, dense, kernel_cache, packages, ssta
from hunyuan_staged.attention.choose import AttentionMode, choose_attention
from hunyuan_staged.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GRID = (12, 16, 20)


def kernel(mode: str, device: torch.device, dtype: torch.dtype):
    return choose_attention(mode, device, dtype).kernels(GRID, 1)[0]


@pytest.mark.parametrize("mode", ["flash", "torch"])
def test_on_a_cpu_exact_attention_is_torchs(mode):
    assert choose_attention(mode, CPU, torch.float32).name == "torch"
    attention = kernel(mode, CPU, torch.float32)
    q, k, v = torch.randn(3, 1, 9, 2, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
    assert torch.allclose(attention(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v), atol=1e-6)


def test_no_heads_no_work():
    q = torch.zeros(1, 4, 0, 8)
    assert kernel("flash", CPU, torch.float32)(q, q, q).shape == (1, 4, 0, 8)


@pytest.mark.parametrize("mode", ["flash2", "flash3", "flash4", "cudnn", "sageattn"])
def test_a_gpu_mode_on_a_cpu_is_refused(mode):
    with pytest.raises(
        InputError, match=f"--attn_mode {mode} needs a GPU, and this run is on a cpu; use flash or torch"
    ):
        choose_attention(mode, CPU, torch.bfloat16)


def hopper(monkeypatch, *present: str) -> None:
    """A Hopper GPU that does not exist, on which these packages are installed."""
    monkeypatch.setenv(kernel_cache.ENABLED, "0")  # the user's cache folder stays out of it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(choose, "installed", lambda package: package in present)
    # What is tried there is tried here.
    tokens = packages.trial_tokens
    monkeypatch.setattr(packages, "trial_tokens", lambda _, __, *size: tokens(CPU, torch.float32, *size))
    monkeypatch.setattr(choose, "sdpa", lambda *backends: dense.sdpa())
    packages.obstacle.cache_clear()


def test_a_kernel_that_does_not_take_the_models_heads(monkeypatch):
    """The demo's heads are 32 wide: the fastest kernel is then another, and one that was asked for is refused."""
    hopper(monkeypatch, "flash_attn.cute", "sageattention")
    for mode, width, takes in (("flash4", 32, "64, 96, 128"), ("sageattn", 160, "up to 128")):
        message = f"--attn_mode {mode}: it takes heads .*{takes} wide, and this model's are {width}; use flash"
        with pytest.raises(InputError, match=message):
            choose_attention(mode, CUDA, torch.bfloat16, head_width=width)
    assert choose_attention("flash", CUDA, torch.bfloat16, head_width=32).name == "cudnn"


@pytest.mark.parametrize(("width", "wanted"), [(32, 64), (80, 96), (128, 128)])
def test_sageattn_gets_heads_of_a_width_that_it_takes(monkeypatch, width, wanted):
    seen = []

    def sageattn(q, k, v, tensor_layout, sm_scale=None):
        seen.append((q.shape, sm_scale))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, scale=sm_scale).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    hopper(monkeypatch, "sageattention")
    attend = choose_attention("sageattn", CUDA, torch.bfloat16, head_width=width).kernels(GRID, 1)[0]
    q, k, v = torch.randn(3, 1, 9, 2, width, generator=torch.Generator().manual_seed(0))
    out = attend(q, k, v)
    scale = None if wanted == width else width**-0.5
    assert seen == [((1, 256, 2, wanted), scale), ((1, 9, 2, wanted), scale)], "the trial, then ours"
    assert torch.allclose(out, exact(q, k, v), atol=1e-6)


def flash4_that_notes(monkeypatch, tiles: list, takes_tiles: bool) -> None:
    """flash-attn-4 on a Hopper of 2 multiprocessors; what it computes is torch's."""

    def inner(q, k, v, tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, out=None):
        tiles.append(tile_mn)
        result = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (result if out is None else out.copy_(result)), None

    package = SimpleNamespace(flash_attn_func=lambda q, k, v: inner(q, k, v))
    package._flash_attn_fwd = inner if takes_tiles else package.flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.cute", SimpleNamespace(interface=package))
    hopper(monkeypatch, "flash_attn.cute")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))


@pytest.mark.parametrize(
    ("capability", "width", "takes_tiles", "tile"),
    [
        ((9, 0), 128, True, (192, 128)),
        ((9, 0), 64, True, None),
        ((10, 0), 128, True, None),
        ((9, 0), 128, False, None),
    ],
)
def test_flash4_gets_a_tile_of_ours_where_that_is_faster(monkeypatch, capability, width, takes_tiles, tile):
    """On Hopper, for heads of 128, if this version of the package lets one choose; else it chooses."""
    tiles = []
    flash4_that_notes(monkeypatch, tiles, takes_tiles)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q, k, v = torch.randn(3, 1, 9, 2, width, generator=torch.Generator().manual_seed(0))
    for mode in ("flash", "flash4"):
        chosen = choose_attention(mode, CUDA, torch.bfloat16, head_width=width)
        assert chosen.name == "flash4"
        assert torch.allclose(chosen.kernels(GRID, 1)[0](q, k, v), exact(q, k, v), atol=1e-6)
    assert tiles == [tile] * 4, "a trial and a call for each mode"


def test_the_queries_of_a_last_wave_with_few_tiles_go_through_small_ones(monkeypatch):
    tiles = []
    flash4_that_notes(monkeypatch, tiles, True)
    attend = choose_attention("flash4", CUDA, torch.bfloat16).kernels(GRID, 1)[0]
    tiles.clear()
    q, k, v = torch.randn(3, 1, 500, 1, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(attend(q, k, v), exact(q, k, v), atol=1e-6)
    assert tiles == [(192, 128), (128, 128)]


@pytest.mark.parametrize(
    ("queries", "heads", "first"),
    [
        (47056, 4, 44352),  # 7.45 waves, 49 frames of 720p on 8 ranks: 7 of large tiles and one of small ones
        (47056, 16, 47056),  # 29.8 waves
        (111856, 4, 111856),  # 17.7 waves: small tiles would gain 1.7 %
        (7000, 4, 6336),  # 1.1 waves
        (6336, 4, 6336),  # one whole wave
        (100, 4, 100),  # less than a wave
        (32900, 200, 32900),  # more heads than multiprocessors
    ],
)
def test_how_many_queries_go_through_large_tiles(queries, heads, first):
    assert dense.whole_waves(queries, heads, processors=132) == first


def broken(monkeypatch, package: str, failure: Exception) -> None:
    """A package whose import raises."""

    def import_module(name):
        raise failure if name == package else ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(packages, "import_module", import_module)
    packages.obstacle.cache_clear()


SYMBOL = ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10\nmore")


def test_a_wheel_built_for_another_torch_costs_a_line(monkeypatch):
    """It is found, and raises when it is imported: flash goes on without it and says why, an explicit mode is refused."""
    hopper(monkeypatch)
    monkeypatch.setattr(choose, "installed", packages.installed)
    broken(monkeypatch, "flash_attn.cute", SYMBOL)
    why = "does not load (ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10 more)"
    remedy = "pip install --pre flash-attn-4"
    chosen = choose_attention("flash", CUDA, torch.bfloat16)
    assert chosen.name == "cudnn"
    broken_flash4 = f"flash4: the package flash_attn.cute {why} ({remedy})"
    assert chosen.reason == f"the fastest exact kernel that is installed; {broken_flash4}"
    with pytest.raises(InputError) as refused:
        choose_attention("flash4", CUDA, torch.bfloat16)
    assert str(refused.value) == f"--attn_mode flash4: the package flash_attn.cute {why} ({remedy}); use flash or torch"
    broken(monkeypatch, "flash_attn.flash_attn_interface", SYMBOL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for mode in ("flash", "flash2"):
        assert choose_attention(mode, CUDA, torch.bfloat16).name == "flash2"
        assert choose_attention(mode, CUDA, torch.bfloat16).reason.endswith("torch's own FlashAttention-2")
    packages.obstacle.cache_clear()


def test_a_package_that_lacks_one_of_its_own_is_not_called_absent(monkeypatch):
    broken(monkeypatch, "sageattention", ModuleNotFoundError("No module named 'triton'", name="triton"))
    assert packages.obstacle("sageattention") == "does not load (ModuleNotFoundError: No module named 'triton')"
    assert packages.obstacle("flash_attn.cute") == "is not installed"
    packages.obstacle.cache_clear()


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (
            RuntimeError("no kernel image\nis available"),
            "its kernel fails here (RuntimeError: no kernel image is available)",
        ),
        (torch.zeros(()), "its kernel gives wrong numbers here"),
        (torch.tensor(float("nan")), "its kernel gives wrong numbers here"),
    ],
)
def test_a_kernel_that_fails_in_its_trial_is_passed_over(monkeypatch, result, why):
    def flash_attn_func(q, k, v):
        if isinstance(result, Exception):
            raise result
        return result.expand(q.shape)

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    hopper(monkeypatch, "flash_attn_interface")
    chosen = choose_attention("flash", CUDA, torch.bfloat16)
    assert (chosen.name, chosen.reason) == ("cudnn", f"the fastest exact kernel that is installed; flash3: {why}")
    with pytest.raises(InputError) as refused:
        choose_attention("flash3", CUDA, torch.bfloat16)
    assert str(refused.value) == f"--attn_mode flash3: {why}; use flash or torch"


def test_where_no_flash_kernel_runs_torch_does(monkeypatch):
    def fail(*backends):
        if backends:
            raise RuntimeError("no")
        return dense.sdpa()

    hopper(monkeypatch)
    monkeypatch.setattr(choose, "sdpa", fail)
    chosen = choose_attention("flash", CUDA, torch.bfloat16)
    assert chosen.name == "torch"
    failed = "its kernel fails here (RuntimeError: no)"
    assert chosen.reason == f"no flash kernel runs here; cudnn: {failed}; flash2: {failed}"


def test_flash3_is_hoppers_alone(monkeypatch):
    """Its package has kernels for compute capability 9 only; on a B200 they fail at the first step."""
    hopper(monkeypatch, "flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=lambda q, k, v: (v, None)))
    assert choose_attention("flash", CUDA, torch.bfloat16).name == "flash3"
    for capability in ((10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_attention("flash", CUDA, torch.bfloat16).name == "cudnn"
        with pytest.raises(InputError, match=rf"--attn_mode flash3: its kernels .* has {capability[0]}\.0; use flash"):
            choose_attention("flash3", CUDA, torch.bfloat16)


@pytest.mark.parametrize(("mode", "runs"), [("cudnn", True), ("flash3", False), ("flash4", False)])
def test_what_an_ampere_gpu_takes(monkeypatch, mode, runs):
    hopper(monkeypatch, "flash_attn_interface", "flash_attn.cute")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    if runs:
        assert choose_attention(mode, CUDA, torch.bfloat16).name == mode
        return
    with pytest.raises(InputError, match="Hopper"):
        choose_attention(mode, CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "width", "present", "kernel"),
    [
        (torch.bfloat16, 128, ["flash_attn.cute"], "flash4"),
        (torch.bfloat16, 32, ["flash_attn.cute"], "flex"),
        (torch.float32, 128, ["flash_attn.cute"], "flex"),
        (torch.bfloat16, 128, [], "flex"),
        (torch.bfloat16, 128, ["flash_attn.cute", "flex_block_attn"], "flex_block_attn"),
    ],
)
def test_what_computes_ssta_on_hopper(monkeypatch, dtype, width, present, kernel):
    hopper(monkeypatch)
    monkeypatch.setattr(packages, "obstacle", lambda package: None if package in present else packages.ABSENT)
    for name in ("flash4", "flex_block_attn"):  # what runs there runs here as if it did
        monkeypatch.setitem(ssta.KERNELS, name, ssta.gathered)
    assert ssta.fastest_kernel(CUDA, dtype, width)[0] == kernel


def test_ssta_passes_over_a_package_that_does_not_load_or_whose_kernel_fails(monkeypatch):
    """Its modes were taken as soon as the package was found, and failed at the first step."""

    def failing(tiles):
        raise RuntimeError("no kernel image\nis available")

    hopper(monkeypatch)
    monkeypatch.setattr(packages, "obstacle", {"flex_block_attn": "does not load (ImportError: x)"}.get)
    monkeypatch.setitem(ssta.KERNELS, "flash4", ssta.gathered)
    unloaded = "flex_block_attn: the package flex_block_attn does not load (ImportError: x)"
    found = ssta.fastest_kernel(CUDA, torch.bfloat16, 128)
    assert found == ("flash4", f"flash-attn-4 over the blocks that are kept; {unloaded}")
    monkeypatch.setitem(ssta.KERNELS, "flash4", failing)
    failed = "flash4: its kernel fails here (RuntimeError: no kernel image is available)"
    reason = f"torch's flex_attention over the blocks that are kept; {unloaded}; {failed}"
    assert choose_attention("flex-block-attn", CUDA, torch.bfloat16).reason == reason
    monkeypatch.setitem(ssta.KERNELS, "flash4", lambda tiles: lambda q, k, v, mask: 2 * q)
    assert ssta.fastest_kernel(CUDA, torch.bfloat16, 128)[1].endswith("flash4: its kernel gives wrong numbers here")


def test_blocks_outside_the_range_run_the_other_kernel():
    def constant(value: float) -> AttentionMode:
        return AttentionMode("constant", "a test", lambda grid: lambda q, k, v: torch.full_like(q, value))

    mode = AttentionMode("mixed", "a test", constant(1.0).make, range(1, 3), constant(2.0))
    q = torch.zeros(1, 2, 1, 4)
    assert [float(run(q, q, q).mean()) for run in mode.kernels(GRID, 5)] == [2.0, 1.0, 1.0, 2.0, 2.0]


def test_an_unknown_mode_lists_the_known():
    with pytest.raises(InputError, match="'fast' is unknown; known: flash, flash2, flash3, flash4, cudnn, sageattn"):
        choose_attention("fast", CPU, torch.bfloat16)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return kernel("torch", CPU, torch.float32)(*(x.float().cpu() for x in (q, k, v)))


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours.float().cpu() - reference).norm() / reference.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "width", "tolerance"),
    [
        *[(mode, 128, 5e-3) for mode in ("flash", "flash2", "flash4", "cudnn", "torch")],
        *[("sageattn", width, 5e-2) for width in (128, 32)],
    ],
)
def test_every_kernel_agrees_with_float32_on_the_gpu(mode, width, tolerance):
    """Modes whose package is absent are no case of this test there: pytest names them as skipped, with the reason."""
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, 1111, 4, width, device="cuda", dtype=torch.bfloat16, generator=draw)
    reference = exact(q, k, v)
    try:
        attend = choose_attention(mode, CUDA, torch.bfloat16, head_width=width).kernels(GRID, 1)[0]
    except InputError as error:
        pytest.skip(str(error))
    assert distance(attend(q, k, v), reference) < tolerance


@pytest.mark.gpu
def test_flash4_agrees_with_float32_where_two_sizes_of_tiles_share_the_queries():
    processors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    queries = 192 * (processors // 4) + 664
    assert dense.whole_waves(queries, 4, processors) < queries
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = torch.randn(3, 1, queries, 4, 128, device="cuda", dtype=torch.bfloat16, generator=draw)
    try:
        attend = choose_attention("flash4", CUDA, torch.bfloat16).kernels(GRID, 1)[0]
    except InputError as error:
        pytest.skip(str(error))
    assert distance(attend(q, k, v), exact(q, k, v)) < 5e-3


def test_flash4_warns_of_nothing_that_a_user_could_change():
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        packages.silence_flash4()
        warnings.warn(
            "Argument aux_data (position 17) cannot be converted to a JitArgument for function 'x'", stacklevel=1
        )
        warnings.warn("Argument other (position 1) cannot be converted to a JitArgument", stacklevel=1)
    assert [str(warning.message) for warning in seen] == [
        "Argument other (position 1) cannot be converted to a JitArgument"
    ]
