"""Compiled kernels stay in a folder of the user's own."""

import os

import pytest

from hunyuan_staged.attention import kernel_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in (kernel_cache.ENABLED, kernel_cache.FOLDER):
        monkeypatch.setenv(name, "")  # so that what the call sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hunyuan_staged" / "flash_attn_4"


def test_kernels_are_kept_below_the_users_cache_folder(cache):
    kernel_cache.keep_flash4_kernels()
    assert os.environ[kernel_cache.ENABLED] == "1"
    assert os.environ[kernel_cache.FOLDER] == str(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_users_own_setting_stands(cache, monkeypatch):
    monkeypatch.setenv(kernel_cache.ENABLED, "0")
    kernel_cache.keep_flash4_kernels()
    assert os.environ[kernel_cache.ENABLED] == "0"
    assert kernel_cache.FOLDER not in os.environ
    assert not cache.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_not_used(cache, mode):
    """Object files in it would be loaded into the process."""
    cache.mkdir(parents=True)
    cache.chmod(mode)
    kernel_cache.keep_flash4_kernels()
    assert kernel_cache.ENABLED not in os.environ


def test_a_cache_folder_that_cannot_be_made_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernel_cache.keep_flash4_kernels()
    assert kernel_cache.ENABLED not in os.environ
