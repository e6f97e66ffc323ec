"""Arrays on the devices of several processes."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec


def spans_processes(x: Any) -> bool:
    """Whether parts of `x` are on devices of other processes."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def replicate(x: Any) -> Any:
    """`x` with all of its entries in every process. Every process has to call this."""
    if not spans_processes(x) or x.is_fully_replicated:
        return x
    if not isinstance(x.sharding, NamedSharding):
        return multihost_utils.process_allgather(x, tiled=True)
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=replicated)(x)


def write_once(write: Callable[[], None], leaves: Iterable[Any]) -> None:
    """Calls `write()`, in the first process alone if any of the leaves spans several.
    When this returns in any process, the file is written.

    **Raises:**

    The error of `write` in the process that called it, and `OSError` in the others.
    """
    if not any(map(spans_processes, leaves)):
        return write()
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except Exception as caught:
            error = caught
    failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
    if error is not None:
        raise error
    if failed:
        raise OSError(
            "The first process, which writes for all of them, could not write. Its own "
            "error says why."
        )
