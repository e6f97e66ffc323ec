"""Writing files atomically: a file is there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A context with a new file beside `path`, which replaces the one at `path` at the
    end, if nothing is raised.

    Whatever happens, the file at `path` is the one from before or the whole new one.
    This holds for other writers too, and after a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        # `mkstemp` makes files that only their owner may read.
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
