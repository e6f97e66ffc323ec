"""Several processes of one program on one machine, as a cluster would start them."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence


def launch(program: str, flags: Sequence[str], *, processes: int, devices: int) -> int:
    """Runs `program` in `processes` processes with `devices` virtual devices each, and
    ends all of them when one has failed. What the first one prints is shown.

    Each gets the flags, and `--coordinator` and `--process` besides. The exit status of
    the first that has failed, or 0.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
    }
    address = f"localhost:{_free_port()}"
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as others:
        try:
            for i in range(processes):
                extra = ["--coordinator", address, "--process", str(i)]
                children.append(
                    subprocess.Popen(
                        [sys.executable, program, *flags, *extra],
                        env=environment,
                        # Held open by this process as long as it lives: see `watch`.
                        stdin=subprocess.PIPE,
                        stdout=None if i == 0 else others,
                        stderr=None if i == 0 else others,
                    )
                )
            failed = _first_failure(children)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
        if failed is None:
            return 0
        if failed > 0:
            others.seek(0)
            sys.stderr.buffer.write(others.read()[-4000:])
    status = children[failed].returncode
    print(
        f"Process {failed} of {processes} ended with status {status}, so the others "
        "were ended too. Start again with the same flags to go on from the last "
        "checkpoint.",
        file=sys.stderr,
    )
    return status if status > 0 else 128 - status


def watch() -> None:
    """Ends this process when the one that launched it is gone, however that ended:
    nobody is left to end the others if one of them fails."""

    def wait() -> None:
        # Not by way of `sys.stdin`, whose lock would be missed when Python ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all of them, or for the first that fails."""
    while True:
        statuses = [child.poll() for child in children]
        failed = [i for i, status in enumerate(statuses) if status]
        if failed:
            return failed[0]
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
