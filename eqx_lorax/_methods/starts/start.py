"""How the factors of an adapter start, where both do or the base has a part in it."""

import abc
from typing import Any, ClassVar

from jaxtyping import Array


class AbstractStart(abc.ABC):
    """A start for `init=` of `lorax.loraify`.

    A subclass is called with a `lorax.Fresh`, and returns the factors `b` and `a`, of
    the axes `fresh.b_axes` and `fresh.a_axes`, in float32 or wider.
    """

    changes_base: ClassVar[bool]
    """Whether `b · a` is not zero at the start and the method is to measure the update
    from there, so that a fresh adapter adds nothing all the same."""

    @abc.abstractmethod
    def __call__(self, fresh: Any) -> tuple[Array, Array]:
        """**Arguments:**

        - `fresh`: The `lorax.Fresh` of the array: its base, rank, scale, key and path.

        **Returns:**

        The factors `b` and `a`.
        """
