import os
import sys


# Before JAX is imported: tests of sharded models need several devices.
_FLAGS = {"--xla_force_host_platform_device_count": "8"}
# The programs of the tests are small and many. Machine code that is not optimised takes
# little more than half the time, most of which is compiling. The gate runs some of them
# in either way.
if os.environ.get("LORAX_OPTIMISED") != "1":
    _FLAGS["--xla_backend_optimization_level"] = "0"
    _FLAGS["--xla_llvm_disable_expensive_passes"] = "true"
_given = os.environ.get("XLA_FLAGS", "")
_more = [f"{name}={value}" for name, value in _FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_more])

import jax  # noqa: E402
import pytest  # noqa: E402
from equinox.internal import GetKey  # noqa: E402


# Not by default, since the tests marked `own_errors` expect the library's own errors.
# Before the library is imported.
if os.environ.get("LORAX_CHECK_ANNOTATIONS") == "1":
    import jaxtyping

    assert "eqx_lorax" not in sys.modules
    jaxtyping.install_import_hook("eqx_lorax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    """On a GPU, where these are not."""
    if item.get_closest_marker("eight_devices") and jax.device_count() < 8:
        pytest.skip("needs eight devices")
    if item.get_closest_marker("cpu") and jax.default_backend() != "cpu":
        pytest.skip("is of what XLA compiles for a CPU")


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Forgets what was compiled after each file."""
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    """A function that gives a new key in each call. A failing test shows the seed."""
    return GetKey()


@pytest.fixture
def as_for_users():
    """Promotion of dtypes and ranks as JAX has them by default. The other tests run
    without."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
