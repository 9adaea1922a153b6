"""Offloaded blocks: one copy for all processes of a machine."""

import re
from pathlib import Path

import pytest
import torch
from offloaded import loaded

from hunyuan_staged.parallel.world import World
from hunyuan_staged.weights import components, key_maps


def mapping() -> str:
    """Inode of the memory that offloading maps, as the kernel knows it."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:hunyuan_staged" in line]
    assert len({line.split()[4] for line in lines}) == 1, lines
    assert all(line.split()[1].endswith("s") for line in lines), "mapped as shared"
    return lines[0].split()[4]


def reads(world: World, folder: Path) -> tuple[str, list[str], list[float], float]:
    """(the mapping, names that were read, sums of the blocks' weights, a value that the other process has written)."""
    names: list[str] = []
    original = key_maps.diffusers_tensors

    def noting(name, tensor, rules):
        names.append(name)
        return original(name, tensor, rules)

    components.diffusers_tensors = noting
    blocks = loaded(folder, 2, world)[1]
    sums = [float(sum(t.double().sum() for t in block.parameters())) for block in blocks[:]]
    world.barrier("read")
    cell = blocks.host_blocks.memory[:4].view(torch.float32)
    if world.rank == 1:
        cell.fill_(7.5)
    world.barrier("written")
    return mapping(), names, sums, float(cell)


def test_processes_of_a_machine_share_one_copy_that_one_of_them_reads(tiny_official, ranks):
    one, blocks = loaded(tiny_official, 2)
    (inode, names, sums, cell), (inode_1, names_1, sums_1, cell_1) = ranks.run(2, reads, tiny_official)
    assert inode == inode_1, "the same memory"
    assert cell == cell_1 == 7.5, "what one writes the other sees"
    expected = [float(sum(t.double().sum() for t in block.parameters())) for block in one.transformer_blocks]
    assert sums == sums_1
    assert sums == expected if ranks.most is None else sums == pytest.approx(expected, abs=1e-6)  # a GPU's own order
    offloaded = re.compile(rf"double_blocks\.({'|'.join(map(str, blocks.host_blocks.which))})\.")
    assert any(offloaded.match(name) for name in names)
    assert not any(offloaded.match(name) for name in names_1), "the file is read once"
    assert {name for name in names if not offloaded.match(name)} == set(names_1)
