"""How many processes make one of many videos together."""

import pytest

from hunyuan_staged.pipeline.groups import choose_size


@pytest.mark.parametrize(
    ("processes", "videos", "size"),
    [(8, 100, 1), (8, 8, 1), (8, 4, 2), (8, 2, 4), (8, 1, 8), (4, 5, 4), (6, 2, 3), (1, 3, 1)],
)
def test_no_process_waits_while_there_are_videos_enough(processes, videos, size):
    assert choose_size(processes, videos) == size


def test_a_video_that_needs_several_gets_them():
    assert choose_size(8, 100, lambda size: size >= 2) == 2
    assert choose_size(8, 100, lambda size: False) == 8
