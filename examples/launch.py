"""Starts several processes of one program on one machine, as a cluster would. It
imports nothing slow, so that they start at once."""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence


def start(program: str) -> None:
    """Call this first, in a program that has the flags `--processes`, `--devices` and
    `--cluster`. It returns only in the processes that do the work: in each process that
    it launches, and in those that a cluster has started."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    for name in ("--cluster", "--help", "-h"):
        parser.add_argument(name, action="store_true")
    args, _ = parser.parse_known_args()
    if args.process is not None:
        _watch()
    elif not (args.cluster or args.help or args.h):
        sys.exit(launch(program, sys.argv[1:], args.processes, args.devices))


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, default, help in [
        ("--processes", 2, "processes to start on this machine"),
        ("--devices", 4, "virtual devices of each of them"),
    ]:
        parser.add_argument(name, type=int, default=default, help=help)
    for name, kind in (("--coordinator", str), ("--process", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)


def launch(program: str, flags: Sequence[str], processes: int, devices: int) -> int:
    """Runs `program` in `processes` processes with `devices` virtual devices each, and
    ends all of them when one has failed. Only the output of the first one is shown.

    Each process gets the flags, and also `--coordinator` and `--process`. Returns the
    exit status of the first one that failed, or 0.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
    }
    address = f"localhost:{free_port()}"
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as others:
        try:
            for i in range(processes):
                extra = ["--coordinator", address, "--process", str(i)]
                children.append(
                    subprocess.Popen(
                        [sys.executable, program, *flags, *extra],
                        env=environment,
                        # This process holds it open as long as it lives: see `_watch`.
                        stdin=subprocess.PIPE,
                        stdout=None if i == 0 else others,
                        stderr=None if i == 0 else others,
                    )
                )
            listed = " ".join(str(child.pid) for child in children)
            print(f"Started processes {listed}", flush=True)
            failed = _first_failure(children)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
        if failed is None:
            return 0
        status = children[failed].returncode
        if failed == 0 and status > 0:
            return status  # It has printed the reason.
        others.seek(0)
        sys.stderr.buffer.write(others.read()[-4000:])
    print(
        f"Process {failed} of {processes} ended with status {status}, so the others "
        "were ended too.",
        file=sys.stderr,
    )
    return status if status > 0 else 128 - status


def _watch() -> None:
    """Ends this process when the one that launched it is gone for any reason, since
    nothing would then end the other processes if one fails."""

    def wait() -> None:
        # Not through `sys.stdin`: Python needs its lock when it exits.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits until all have ended or one has failed."""
    while True:
        statuses = [child.poll() for child in children]
        if any(statuses):
            if max(status or 0 for status in statuses) > 0:
                # All fail on a wrong flag, for instance: let the first one say so.
                time.sleep(0.5)
            return next(i for i, child in enumerate(children) if child.poll())
        if all(status == 0 for status in statuses):
            return None
        time.sleep(0.05)


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
