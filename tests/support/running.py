"""Programs in processes of their own, for the tests.

They end whatever happens, with all that they have started. There is no fixed limit of
time, since the machine may be busy: a program is waited for as long as it prints or
computes something.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil


PATIENCE = 180
"""Seconds in which a program may do nothing at all."""

RUNAWAY = 3600
"""Seconds of computing after which a program is not going to end."""


class Program:
    """A running program, made by `running`."""

    def __init__(self, process: psutil.Popen, folder: Path):
        self.process = process
        self._folder = folder

    @property
    def out(self) -> str:
        """Its standard output."""
        return (self._folder / "out").read_text()

    @property
    def err(self) -> str:
        """Its standard error."""
        return (self._folder / "err").read_text()

    @property
    def status(self) -> int | None:
        """Its exit status, `None` while it runs."""
        return self.process.poll()

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Waits until the condition holds or the program has ended. Returns whether the
        condition held."""
        is_met = False

        def is_met_or_over() -> bool:
            nonlocal is_met
            is_met = condition()
            return is_met or self.status is not None

        _wait_until(is_met_or_over, self)
        return is_met

    def wait_until_nothing_is_left(self) -> None:
        """Waits until all processes that it has started have ended, too."""
        _wait_until(lambda: not self.processes(), self)

    def finish(self, status: int = 0) -> None:
        """Waits until it has ended, and asserts that its exit status is this one."""
        self.wait_until(lambda: False)
        assert self.status == status, self.out + self.err

    def end(self) -> None:
        """Kills it and all processes that it has started, and waits until they have
        ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.wait_until_nothing_is_left()

    def processes(self) -> list[psutil.Process]:
        """The processes that still run: the program and those that it has started."""
        return [x for x in psutil.process_iter() if _is_of(x, self.process.pid)]


# Runs a program until it ends or the tests end for any reason, since then nothing holds
# the other end of its standard input. All processes that it has started end with it.
_WATCHED = """
import os, runpy, signal, sys, threading

def watch():
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def running(
    program: Path | str,
    *arguments: Any,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Program]:
    """Runs a Python program, and ends it at the end of the `with`.

    **Arguments:**

    - `program`: Its file, or its text.
    - `arguments`: Its arguments.
    - `folder`: Where it runs.
    - `environment`: All its environment variables. By default those of the tests.
    """
    with tempfile.TemporaryDirectory() as kept:
        if isinstance(program, str):
            file = Path(kept) / "program.py"
            file.write_text(textwrap.dedent(program))
            program = file
        # Not pipes, which something would have to read.
        with open(f"{kept}/out", "w") as out, open(f"{kept}/err", "w") as err:
            process = psutil.Popen(
                [sys.executable, "-c", _WATCHED, *map(str, (program, *arguments))],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                # A separate process group, which can be ended as a whole.
                start_new_session=True,
            )
        started = Program(process, Path(kept))
        try:
            yield started
        finally:
            started.end()
            process.stdin.close()


def finish_together(*programs: Program) -> None:
    """Waits until all have ended or one has failed, and asserts that none has."""

    def is_over() -> bool:
        statuses = [program.status for program in programs]
        return any(statuses) or None not in statuses

    _wait_until(is_over, *programs)
    printed = "\n".join(program.out + program.err for program in programs)
    assert [program.status for program in programs] == [0] * len(programs), printed


def _wait_until(condition: Callable[[], bool], *programs: Program) -> None:
    began = looked = time.monotonic()
    before = None
    while not condition():
        now = time.monotonic()
        if now > looked + 0.5:
            seconds = sum(_computed(y) for x in programs for y in x.processes())
            # A program that waits in vain still wakes up now and then.
            done = int(2 * seconds), *(x.out + x.err for x in programs)
            began = now if done != before else began
            looked, before = now, done
            assert now < began + PATIENCE, f"It hangs: {done}"
            assert seconds < RUNAWAY, f"It does not end: {done}"
        time.sleep(0.005)


def _is_of(process: psutil.Process, group: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        is_there = process.status() != psutil.STATUS_ZOMBIE
        return is_there and os.getpgid(process.pid) == group
    return False


def _computed(process: psutil.Process) -> float:
    """The CPU time in seconds."""
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return 0.0
