"""The quantised array."""

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from .._factored import as_form, Factored, materialise, operators, views
from .._shared import AbstractQuickModule, axes_from_end, relabel, replace_unchecked
from .formats import Format


class QuantisedArray(AbstractQuickModule):
    """Stands for an array of floats. It holds a few bits for each entry.

    The last axes, `inner`, are one row of entries after another, in blocks. The entries
    of a block share a scale, and in some formats an offset. The axes before them lead
    every array that is held, so that slicing these, as `jax.lax.scan` and `jax.vmap`
    do, gives a valid `QuantisedArray`.

    It has an array's `shape`, `dtype`, `ndim`, `size`, `nbytes` (as stored), `@` on
    both sides, `.T`, `.mT`, `.astype`, and indexing along leading axes, which for a
    table dequantises only the rows that are looked up. Products dequantise on the way
    in and again in the backward pass. Nothing in it is trained: no derivative is taken
    in its scales.

    It is made by `lorax.quantise` and by the functions of `lorax.quantised`.

    !!! example

        ```python
        weight = lorax.quantise(model).layers[0].weight
        weight.nbytes  # what is stored
        weight.shape, weight.dtype  # of what it stands for
        weight.dequantise()  # an array
        ```
    """

    codes: tuple[Any, ...]
    """The planes of the codes, uint8 of shape `(*leading, blocks, bytes)`."""

    scales: Any
    """The scale of each block, of shape `(*leading, blocks)`: an array, or again a
    `QuantisedArray`, where scales are nested."""

    offsets: Any
    """What is added in each block, likewise; or `None`."""

    # Arrays have no trained bits, so all else is static.
    format: Format = eqx.field(static=True)
    """What a code stands for."""

    inner: tuple[int, ...] = eqx.field(static=True)
    """The sizes of the axes along which the blocks lie. The last block may be padded.
    Of an array in parts, as in `jax.shard_map`, the first size is that of all."""

    float_dtype: np.dtype = eqx.field(static=True)
    """The dtype that it dequantises to."""

    permutation: tuple[int, ...] | None = eqx.field(static=True, default=None)
    """For each axis of `shape` the stored axis, counted from the end; `None` if the
    orders are the same."""

    # NumPy on the left of `@` then leaves the product to `__rmatmul__`.
    __array_ufunc__ = None

    @property
    def block(self) -> int:
        """The number of entries in a block."""
        return self.codes[0].shape[-1] * 8 // self.format.bits[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The sizes of the axes in the order in which they are stored.

        **Raises:**

        `ValueError` if the arrays do not fit each other.
        """
        if self.codes[0].ndim < 2:
            raise self._not_whole()
        *leading, blocks, _ = self.codes[0].shape
        size, rest = math.prod(self.inner), math.prod(self.inner[1:])
        first = self.inner[0]
        if blocks != -(-size // self.block):
            first, left = divmod(blocks * self.block, rest)
            if left or not first or self.inner[0] % first:
                raise self._not_whole()
        if tuple(self.scales.shape) != (*leading, blocks):
            raise self._not_whole()
        return (*leading, first, *self.inner[1:])

    @property
    def stored_axes(self) -> tuple[int, ...]:
        """The stored axes, counted from the end, in the order of `shape`."""
        ndim = self.ndim
        if self.permutation is None:
            return tuple(axes_from_end(ndim))
        # As in `Factored.logical_axes`: leading axes come and go.
        kept = tuple(axis for axis in self.permutation if axis >= -ndim)
        if self.permutation[len(self.permutation) - len(kept) :] != kept:
            raise self._not_whole()
        return (*range(-ndim, -len(kept)), *kept)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array this stands for."""
        stored = self.stored_shape
        return tuple(stored[axis] for axis in self.stored_axes)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the array this stands for."""
        return self.float_dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.codes[0].ndim - 2 + len(self.inner)

    @property
    def size(self) -> int:
        """The number of elements of the array this stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes that are stored, of codes, scales and offsets."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    @property
    def sharding(self) -> Sharding | None:
        """The sharding of the array this stands for, where that can be said."""
        sharding = getattr(self.codes[0], "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return sharding
        return relabel(sharding, self.code_axes, self.stored_axes)

    @property
    def committed(self) -> bool:
        """Whether somebody chose its sharding."""
        return getattr(self.codes[0], "committed", False)

    @property
    def code_axes(self) -> tuple[int | None, ...]:
        """For each axis of the codes the stored axis that it goes along, counted from
        the end. Blocks go along the first of the inner axes."""
        count = len(self.inner)
        return (*range(-self.ndim, -count), -count, None)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(
            "A QuantisedArray does not turn into an array by itself, because that "
            f"would form all {self.shape} entries unseen. Write `array.dequantise()` "
            "where that is meant, or run the function through `lorax.lora(fn)`."
        )

    def dequantise(self) -> Array:
        """The array this stands for, of `shape` and `dtype`."""
        return _dequantise(self)

    def dequantize(self) -> Array:
        """The same as `dequantise`."""
        return self.dequantise()

    def __matmul__(self, x: ArrayLike) -> Array:
        return operators.matmul(as_form(self), x)

    def __rmatmul__(self, x: ArrayLike) -> Array:
        return operators.rmatmul(as_form(self), x)

    @property
    def T(self) -> "QuantisedArray":
        """The transpose (all axes reversed). A view: nothing is moved."""
        return self.transpose(range(self.ndim)[::-1])

    @property
    def mT(self) -> "QuantisedArray":
        """The transpose of the last two axes. A view: nothing is moved."""
        *batch, rows, columns = range(self.ndim)
        return self.transpose([*batch, columns, rows])

    def transpose(self, axes: Sequence[int]) -> "QuantisedArray":
        """A view with the axes in another order, as in `jax.numpy.transpose`."""
        stored = self.stored_axes
        order = tuple(stored[axis] for axis in axes)
        is_stored = order == tuple(axes_from_end(len(order)))
        return self.replace(permutation=None if is_stored else order)

    def astype(self, dtype: DTypeLike) -> "QuantisedArray":
        """The same, dequantising to another floating dtype.

        **Raises:**

        `TypeError` if the dtype is not floating.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"A QuantisedArray dequantises to floats, not to {jnp.dtype(dtype)}. "
                "Write `array.dequantise().astype(...)`."
            )
        return self.replace(float_dtype=jnp.dtype(dtype))

    def __getitem__(self, item: Any) -> "QuantisedArray | Array":
        """Indexing by integers, integer arrays and slices along the leading axes, as in
        `jax.numpy`. Where a single axis is left, as of a table, the rows are
        dequantised and this is an array.

        **Raises:**

        `TypeError` for an axis along which the blocks lie.
        """
        found = operators.index(as_form(self), item)
        if not isinstance(found, Factored):
            return found
        return views.store_in_order(found).base

    def replace(self, **changes: Any) -> "QuantisedArray":
        """This array with other values in some fields, unchecked."""
        return replace_unchecked(self, **changes)

    def _not_whole(self) -> ValueError:
        return ValueError(
            f"A QuantisedArray has codes {tuple(self.codes[0].shape)} and scales "
            f"{tuple(self.scales.shape)}, which do not belong together for blocks of "
            f"{self.block} along {self.inner}. Was it sliced, by `vmap` or `scan`, "
            "along another axis than its first?"
        )

    def __pdoc__(self, **options: Any) -> Any:
        # The caller has imported it already.
        import wadler_lindig as wl

        if not hasattr(self.codes[0], "shape"):
            # Of the parts of a partition, or of a filter spec.
            return wl.TextDoc(f"QuantisedArray({self.codes[0]})")
        like = wl.array_summary(self.shape, jnp.dtype(self.dtype).name, kind=None)
        return (
            wl.TextDoc("QuantisedArray(")
            + like
            + wl.TextDoc(f", {self.format.name}, block={self.block})")
        )


def is_quantised(x: Any) -> TypeGuard[QuantisedArray]:
    """Whether `x` is a `QuantisedArray`."""
    return isinstance(x, QuantisedArray)


_dequantise = jax.jit(materialise)
