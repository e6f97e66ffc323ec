"""The suite on every environment that the project claims: `nox`, or one of the sessions
that `nox --list` shows."""

import tomllib
from pathlib import Path

import nox


nox.options.default_venv_backend = "venv"
WHOLE = ("-m", "not interop and not nightly and not site")
# As users compile. Without optimisation XLA of JAX 0.12 has derivatives of `tanh` near
# its limits that are off by more than some tests allow.
OPTIMISED = {"LORAX_OPTIMISED": "1"}
PROJECT = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text())


@nox.session(python=["3.11", "3.13"])
def newest(session: nox.Session) -> None:
    """The newest release of JAX for that Python, and of everything else."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("python", "-m", "pytest", *WHOLE, *session.posargs, env=OPTIMISED)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """The lowest versions that `pyproject.toml` claims."""
    pins = [
        dependency.replace(">=", "==")
        for dependency in PROJECT["project"]["dependencies"]
    ]
    session.install("-e", ".[test]", *pins)
    # Equinox of that time uses what JAX of that time deprecates.
    ignored = ("-W", "ignore::DeprecationWarning")
    command = ("python", "-m", "pytest", *WHOLE, *ignored, *session.posargs)
    session.run(*command, env=OPTIMISED)
