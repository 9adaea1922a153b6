"""A schedule of attention modes: which one each step of a run takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hunyuan_staged.attention.choose import AttentionMode
from hunyuan_staged.attention.modes import SPARSE_ATTN_MODE, Stretch


@dataclass(frozen=True)
class AttentionByStep:
    """The mode of each step, chosen on this device. schedule: what was asked for."""

    schedule: tuple[Stretch, ...]
    modes: tuple[AttentionMode, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The modes that occur, each once, in the order of the steps."""
        return tuple(dict.fromkeys(mode.name for mode in self.modes))

    @property
    def hungriest(self) -> str:
        """The mode that takes the most memory."""
        return SPARSE_ATTN_MODE if SPARSE_ATTN_MODE in self.names else self.names[0]

    def describe(self) -> str:
        """A phrase for the log, e.g. "torch at steps 0-9, flex-block-attn at steps 10-39"."""
        parts: list[tuple[str, int, int]] = []
        for step, mode in enumerate(self.modes):
            name = mode.name if mode.blocks is None else f"{mode.name} in blocks {mode.blocks[0]}-{mode.blocks[-1]}"
            if parts and parts[-1][0] == name:
                parts[-1] = name, parts[-1][1], step
            else:
                parts.append((name, step, step))
        return ", ".join(f"{name} at steps {first}-{last}" for name, first, last in parts)

    def record(self) -> list[list[object]]:
        """The schedule as JSON."""
        return [
            [one.mode, one.steps[0], one.steps[-1], *((one.blocks[0], one.blocks[-1]) if one.blocks else ())]
            for one in self.schedule
        ]


def choose_by_step(
    schedule: Sequence[Stretch], steps: int, otherwise: AttentionMode, choose: Callable[[str], AttentionMode]
) -> AttentionByStep:
    """The modes of `steps` steps; those that no stretch names run `otherwise`. choose: a mode's kernel, or InputError."""
    modes = [otherwise] * steps
    for stretch in schedule:
        mode = choose(stretch.mode)
        if stretch.blocks is not None:
            mode = replace(mode, blocks=stretch.blocks, elsewhere=otherwise)
        modes[stretch.steps[0] : stretch.steps[-1] + 1] = [mode] * len(stretch.steps)
    return AttentionByStep(tuple(schedule), tuple(modes))
