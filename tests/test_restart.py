"""A run on several processes that is killed again and again ends as an unbroken one."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from test_docs import ROOT


pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]

KILLS = 21
STEPS = 60
PATIENCE = 120
"""Seconds for what takes one or two: the machine may be busy."""


class Run:
    """The example, as a shell would start it."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.log = folder, folder / "log"
        folder.mkdir(exist_ok=True)
        flags = "--tiny --processes 2 --devices 2 --mesh 2x2 --every 2"
        flags += f" --steps {STEPS} --rank 2 --train-rows 64 --test-rows 16 --output"
        environment = {
            **os.environ,
            # Only the first process writes to the cache, and finds what it wrote: the
            # other compiles all of it each time, which is to be quick. Not the many
            # devices of the tests.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    ROOT / "examples" / "distributed_finetune.py",
                    *flags.split(),
                    folder,
                ],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def children(self) -> list[int]:
        found = re.search(r"^Started processes ([\d ]+)$", self.log.read_text(), re.M)
        return [int(pid) for pid in found[1].split()] if found else []

    @property
    def names(self) -> set[str]:
        """Of the checkpoints, and of those that are being written."""
        folder = self.folder / "checkpoints"
        return {x.name for x in folder.iterdir()} if folder.is_dir() else set()

    @property
    def latest(self) -> int:
        return max((int(name) for name in self.names if name.isdigit()), default=0)

    def wait_until(self, what) -> bool:
        """Whether it came to that before the run has ended."""
        end = time.monotonic() + PATIENCE
        while not (done := what()) and self.process.poll() is None:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)
        return done

    def finish(self) -> dict[str, object]:
        """The losses of all steps, and all that is in the file of the adapter."""
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()
        assert "Held-out accuracy" in self.log.read_text()
        adapter = self.folder / "distributed.safetensors"
        # Not the bytes of the file, the header of which is in no particular order.
        with safe_open(adapter, "numpy") as file:
            metadata = file.metadata()
        return {
            **{name: x.tobytes() for name, x in load_file(adapter).items()},
            **metadata,
            "losses": (self.folder / "distributed_losses.npy").read_bytes(),
        }

    def kill(self, whom: str) -> bool:
        """Kills one of them, or all; the others must then end by themselves. Whether
        the run had not ended before."""
        children = self.children
        with contextlib.suppress(ProcessLookupError):
            if whom == "all":
                os.killpg(self.process.pid, signal.SIGKILL)
            elif whom == "parent" or not children:
                os.kill(self.process.pid, signal.SIGKILL)
            else:
                os.kill(children[int(whom)], signal.SIGKILL)
        status = self.process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while not all(is_gone(pid) for pid in children):
            assert time.monotonic() < end, f"left behind after killing {whom}"
            time.sleep(0.01)
        return status != 0


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # Ended, but whoever inherited it does not ask how.
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return Path("/proc").is_dir()


@pytest.mark.own_errors
def test_killed_again_and_again(tmp_path):
    cache = tmp_path / "cache"
    with Run(tmp_path / "unbroken", cache) as run:
        assert run.wait_until(lambda: run.latest), run.log.read_text()
        began = time.monotonic()
        expected = run.finish()
        per_checkpoint = (time.monotonic() - began) / (STEPS / 2)

    seed = random.randrange(2**32)
    print(f"{seed = }")
    draw = random.Random(seed)
    until_first = 4.0
    kills, resumed = 0, set()
    for i in range(2 * KILLS):
        moment = draw.choice(("clock", "checkpoint", "writing"))
        whom = ("0", "1", "parent", "all")[i % 4]
        with Run(tmp_path / "broken", cache) as run:
            before, names = run.latest, run.names
            if moment == "clock" or before == STEPS:
                # While it starts, imports, connects, compiles, reads.
                pause = draw.uniform(0, until_first)
                run.wait_until(lambda: time.monotonic() > run.started + pause)
            elif moment == "checkpoint":
                if run.wait_until(lambda: run.latest > before):
                    until_first = time.monotonic() - run.started
                time.sleep(draw.uniform(0, 2 * per_checkpoint))
            else:
                run.wait_until(lambda: {x for x in run.names - names if "tmp" in x})
                time.sleep(draw.uniform(0, 0.05))
            kills += run.kill(whom)
            print(f"{kills}: {whom} at {moment}, {before} to {run.latest}")
            assert run.latest >= before
            resumed.add(run.latest)
        if kills == KILLS:
            break
    assert kills == KILLS
    with Run(tmp_path / "broken", cache) as run:
        assert run.finish() == expected
        assert run.names == {str(STEPS - 2), str(STEPS)}
    # Not all of them before there was anything to go on from, or after the end.
    assert len(resumed - {0, STEPS}) >= 5
