"""bench stage2: device seconds of the parts of a step, by CUDA events and by the profiler."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hunyuan_staged.memory.operations import TEXT_TOKENS


class Stopwatch:
    """Device seconds spent in some calls, by CUDA events, so that nothing waits while the work goes on."""

    def __init__(self) -> None:
        self.spans: list[tuple[Any, Any]] = []

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls on the clock from now on."""
        import torch

        def watched(*args: Any) -> Any:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = function(*args)
            end.record()
            self.spans.append((start, end))
            return result

        return watched

    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        import torch

        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1000


def parts_of_a_step(step: Callable[[], Any], forward: Any) -> dict[str, float]:
    """Device seconds of one more step: attention by events, products and communication by their kernels' names."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    watch, kernels = Stopwatch(), forward.attention
    forward.attention = [replace(kernel, kernel=watch.watch(kernel.kernel)) for kernel in kernels]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
    forward.attention = kernels
    attention = watch.seconds()
    sums = {"linear": 0.0, "communication": 0.0, "all": 0.0}
    for event in profiled.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name, seconds = event.name.lower(), event.self_device_time_total / 1e6
        sums["all"] += seconds
        if "nccl" in name:
            sums["communication"] += seconds
        elif any(word in name for word in ("gemm", "nvjet", "cutlass_80", "cublas")):
            sums["linear"] += seconds
    rest = sums["all"] - attention - sums["linear"] - sums["communication"]
    parts = {"attention": attention, "linear": sums["linear"], "communication": sums["communication"], "rest": rest}
    return {name: round(seconds, 3) for name, seconds in parts.items()}


def mask_seconds(forward: Any, heads: int, width: int, device: Any, dtype: Any) -> float:
    """Device seconds of one of SSTA's masks with its lists, without the attention: the median of five."""
    import torch

    from hunyuan_staged.attention import ssta

    attention = ssta.SparseAttention(forward.grid, device, "torch")
    q, k = torch.randn(2, forward.total + TEXT_TOKENS, heads, width, device=device, dtype=dtype)
    q, k = attention.tiles.gather(q), attention.tiles.gather(k)
    times = []
    for _ in range(6):
        watch = Stopwatch()

        def build() -> None:
            mask = ssta.block_mask(q, k, attention.tiles, attention.window, attention.top_k)
            ssta.block_lists(mask, 3, 2, 1)

        watch.watch(build)()
        times.append(watch.seconds())
    return statistics.median(times[1:])
