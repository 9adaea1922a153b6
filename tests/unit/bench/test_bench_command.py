"""The benchmarks' command line."""

import sys

import pytest

from hunyuan_staged.bench import command


@pytest.mark.parametrize(("stage", "flag"), [("stage2", "layers"), ("stage3", "channels")])
def test_the_full_size_model_on_a_cpu_is_refused(monkeypatch, capsys, stage, flag):
    """It filled the memory until the kernel ended it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", stage])
    assert command.main() == 2
    assert capsys.readouterr().err == (
        f"error: bench {stage} measures the full-size model and needs a GPU; --{flag} makes a smaller one\n"
    )
