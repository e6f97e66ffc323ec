import contextlib
import os
import sys
import zlib
from importlib.metadata import version
from pathlib import Path


# Before JAX is imported: tests of sharded models need several devices.
_FLAGS = {"--xla_force_host_platform_device_count": "8"}
# The tests compile many small programs, and most of their time goes to compiling.
# Without optimisation, and with the older and simpler of two ways to write code, they
# take a third as long. The gate runs some tests in both ways.
if os.environ.get("LORAX_OPTIMISED") != "1":
    _FLAGS["--xla_backend_optimization_level"] = "0"
    _FLAGS["--xla_llvm_disable_expensive_passes"] = "true"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        # Newer ones have no other way.
        _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
        _FLAGS["--xla_cpu_parallel_codegen_split_count"] = "1"
_given = os.environ.get("XLA_FLAGS", "")
_more = [f"{name}={value}" for name, value in _FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_more])

import jax  # noqa: E402
import pytest  # noqa: E402
from equinox.internal import GetKey  # noqa: E402


# Not by default: tests marked `own_errors` expect the library's own errors.
# Must come before the library is imported.
if os.environ.get("LORAX_CHECK_ANNOTATIONS") == "1":
    import jaxtyping

    assert "eqx_lorax" not in sys.modules
    jaxtyping.install_import_hook("eqx_lorax", "beartype.beartype")

# Programs that an earlier run has compiled are not compiled again if both are given the
# same folder. JAX finds them there by all that is in them, by its version and by flags.
_COMPILED = os.environ.get("LORAX_COMPILED")
if _COMPILED:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    jax.config.update("jax_compilation_cache_dir", f"{_COMPILED}/{worker}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Before its workers start, each is given what all have compiled. While they run,
    each writes into a folder of its own, so that none reads half a file."""
    if not _COMPILED or hasattr(config, "workerinput"):
        return
    folders = [folder for folder in Path(_COMPILED).glob("*") if folder.is_dir()]
    for file in [file for folder in folders for file in folder.iterdir()]:
        for folder in folders:
            with contextlib.suppress(FileExistsError):
                (folder / file.name).hardlink_to(file)


def pytest_runtest_setup(item):
    """Skips some tests on a GPU."""
    if item.get_closest_marker("eight_devices") and jax.device_count() < 8:
        pytest.skip("needs eight devices")
    if item.get_closest_marker("cpu") and jax.default_backend() != "cpu":
        pytest.skip("is of what XLA compiles for a CPU")


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Clears JAX's caches after each file."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey(request):
    """A function that returns a new key in each call.

    A test has the same keys in each run, so that one draw in thousands whose rounding
    is amplified, by a sum that cancels, say, does not stop a run at random. With
    `LORAX_SEED=random`, and in the nightly tests, they are others each time, and a
    failing test shows the seed.
    """
    is_random = os.environ.get("LORAX_SEED") == "random"
    if is_random or request.node.get_closest_marker("nightly"):
        return GetKey(None)
    return GetKey(zlib.crc32(request.node.nodeid.encode()) >> 1)


@pytest.fixture
def as_for_users():
    """Restores JAX's default promotion of dtypes and ranks. Other tests run with strict
    rules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
