"""Where compiled attention kernels stay between runs."""

import os
import stat
from pathlib import Path

# Read by flash-attn-4 when it is imported. Its cache is off by default, and its own folder is below /tmp, where another
# user could leave object files for us to load.
ENABLED, FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"


def user_cache() -> Path:
    """The suite's folder below the user's cache folder (XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hunyuan_staged"


def keep_flash4_kernels() -> None:
    """Have flash-attn-4 keep what it compiles, in a folder that only this user can write. Call before it is imported.

    A user's own settings stand. Where no such folder can be made, nothing is kept.
    """
    if ENABLED in os.environ:
        return
    try:
        folder = user_cache() / "flash_attn_4"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return
    os.environ[ENABLED] = "1"
    os.environ.setdefault(FOLDER, str(folder))
