"""A run on several processes that is killed repeatedly ends like an unbroken one."""

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from running import Program, running
from safetensors import safe_open
from safetensors.numpy import load_file


pytestmark = [
    pytest.mark.heavy,
    pytest.mark.processes,
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]

KILLS = 21
STEPS = 60


class Run:
    """The example, run as from a shell."""

    def __init__(self, program: Program, folder: Path):
        self.program, self._folder = program, folder
        self.started = time.monotonic()

    @property
    def names(self) -> set[str]:
        """The names of the checkpoints, including unfinished ones."""
        folder = self._folder / "checkpoints"
        return {x.name for x in folder.iterdir()} if folder.is_dir() else set()

    @property
    def latest(self) -> int:
        return max((int(name) for name in self.names if name.isdigit()), default=0)

    def finish(self) -> dict[str, object]:
        """The losses of all steps, and the contents of the adapter file."""
        self.program.finish()
        assert "Held-out accuracy" in self.program.out
        adapter = self._folder / "distributed.safetensors"
        # Not the bytes of the file, since the order of its header is not fixed.
        with safe_open(adapter, "numpy") as file:
            metadata = file.metadata()
        return {
            **{name: x.tobytes() for name, x in load_file(adapter).items()},
            **metadata,
            "losses": (self._folder / "distributed_losses.npy").read_bytes(),
        }

    def kill(self, whom: str) -> bool:
        """Kills one process, or all; the others must then end by themselves. Returns
        whether the run was still going."""
        parent = self.program.process.pid
        found = re.search(r"^Started processes ([\d ]+)$", self.program.out, re.M)
        children = list(map(int, found[1].split())) if found else []
        with contextlib.suppress(ProcessLookupError):
            if whom == "all":
                os.killpg(parent, signal.SIGKILL)
            elif whom == "parent" or not children:
                os.kill(parent, signal.SIGKILL)
            else:
                os.kill(children[int(whom)], signal.SIGKILL)
        self.program.wait_until_nothing_is_left()
        return self.program.status != 0


@contextlib.contextmanager
def started(folder: Path, cache: Path) -> Iterator[Run]:
    flags = "--tiny --processes 2 --devices 2 --mesh 2x2 --every 2"
    flags += f" --steps {STEPS} --rank 2 --train-rows 64 --test-rows 16 --output"
    environment = {
        **os.environ,
        # Only the first process writes to the cache, and uses it. The other compiles
        # everything each time, so compiling must be quick. The devices of the tests are
        # not used here.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    program = ROOT / "examples" / "distributed_finetune.py"
    with running(program, *flags.split(), folder, environment=environment) as found:
        yield Run(found, folder)


def is_writing(names: set[str]) -> bool:
    return any("tmp" in name for name in names)


@pytest.mark.own_errors
def test_killed_again_and_again(tmp_path):
    cache = tmp_path / "cache"
    with started(tmp_path / "unbroken", cache) as run:
        assert run.program.wait_until(lambda: run.latest > 0), run.program.err
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
        with started(tmp_path / "broken", cache) as run:
            before, names = run.latest, run.names
            if moment == "clock" or before == STEPS:
                # During start, imports, connection, compilation and reading.
                pause = draw.uniform(0, until_first)
                run.program.wait_until(lambda: time.monotonic() > run.started + pause)
            elif moment == "checkpoint":
                if run.program.wait_until(lambda: run.latest > before):
                    until_first = time.monotonic() - run.started
                time.sleep(draw.uniform(0, 2 * per_checkpoint))
            else:
                run.program.wait_until(
                    lambda: any("tmp" in x for x in run.names - names)
                )
                time.sleep(draw.uniform(0, 0.05))
            kills += run.kill(whom)
            print(f"{kills}: {whom} at {moment}, {before} to {run.latest}")
            assert run.latest >= before
            resumed.add(run.latest)
        if kills == KILLS:
            break
    assert kills == KILLS
    with started(tmp_path / "broken", cache) as run:
        assert run.finish() == expected
        assert run.names == {str(STEPS - 2), str(STEPS)}
    # Some runs resumed from a checkpoint in the middle, not only at the start or the
    # end.
    assert len(resumed - {0, STEPS}) >= 5
