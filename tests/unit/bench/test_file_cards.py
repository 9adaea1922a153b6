"""The table of files: what it says of a file's memory is the bytes of its blocks."""

import re

from hunyuan_staged.bench import file_cards
from hunyuan_staged.versions import LAYERS
from hunyuan_staged.weights.quantization.gguf_blocks import TYPES

# Of a block of 2048 channels: 8 maps of attention, and two feed-forwards of 4 times that.
WEIGHTS = 8 * 2048**2 + 4 * 4 * 2048**2


def test_the_differences_between_files_are_those_of_their_blocks():
    rows = {name: cells for name, _, *cells in file_cards.table(50)}
    resident = {name: float(re.fullmatch(r"resident: (\S+) GiB", cells[-1])[1]) for name, cells in rows.items()}
    q8, q4 = (LAYERS * WEIGHTS * TYPES[kind].size / TYPES[kind].values / 2**30 for kind in ("Q8_0", "Q4_K"))
    assert abs(resident["GGUF Q8_0"] - resident["GGUF Q4_K"] - (q8 - q4)) < 0.11, "both are rounded to 0.1"
    # A wide file takes two bytes a weight, and no block besides that is made wide.
    wide = (2 * LAYERS * WEIGHTS - 2 * WEIGHTS) / 2**30
    assert abs(resident["bf16, float16 or float32"] - resident["GGUF Q8_0"] - (wide - q8)) < 0.11
    assert all(len(cells) == len(file_cards.CARDS) for cells in rows.values())
