"""Programs that the tests start always end."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import running as module
from running import finish_together, running


pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(os.name != "posix", reason="groups of processes"),
]

IDLE = "import time; print('on', flush=True); time.sleep(1000)"
# A program that has started another one.
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {IDLE!r}])
"""


def test_what_ends():
    with running("import sys; print(sys.argv[1]); sys.exit(3)", "yes") as program:
        program.finish(status=3)
        assert (program.out, program.err, program.processes()) == ("yes\n", "", [])


def test_what_hangs(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 2)
    with running(PARENT) as program:
        assert program.wait_until(lambda: "on" in program.out)
        started = program.processes()
        with pytest.raises(AssertionError, match="It hangs"):
            program.finish()
    assert len(started) == 2 and not program.processes()


def test_one_of_several_fails():
    with running(IDLE) as idle, running("raise ValueError('mine')") as failing:
        with pytest.raises(AssertionError, match="mine"):
            finish_together(idle, failing)
    assert not idle.processes()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_tests_are_killed(how):
    tests = f"""
    import sys
    sys.path.insert(0, {os.path.dirname(module.__file__)!r})
    from running import running

    with running({PARENT!r}) as program:
        program.wait_until(lambda: "on" in program.out)
        print(program.process.pid, flush=True)
        program.finish()
    """
    with running(tests) as program:
        assert program.wait_until(lambda: "\n" in program.out)
        inner = module.Program(psutil.Process(int(program.out)), Path())
        assert len(inner.processes()) == 2
        os.kill(program.process.pid, how)
        inner.wait_until_nothing_is_left()
        assert program.process.wait() == -how
