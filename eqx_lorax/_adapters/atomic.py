"""Writing files that are there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place at the end, if nothing is raised.

    Whatever happens, what is at `path` is what was there before or the whole of what
    was written, also for other writers, and after the power has failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        # Files made by `mkstemp` are for their owner alone.
        os.chmod(new, 0o666 & ~_umask())
        _sync(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    if os.name == "posix":
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
