"""Products with a dense array that is made where it is used: that of a packed base, or
the sum of base and update.

Plain derivatives would keep the dense array from the forward pass to the backward pass,
and the gradient of a sum has its shape. Here the product is a primitive that is linear
in the activation. Its transpose is such a product again, and so makes the dense array
anew. Derivatives in the leaves of the base are those of the product without the sum.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from ..._shared import has_typed_mesh, is_for_one_device


@dataclasses.dataclass(frozen=True)
class Product:
    """`fn(base, x, **arguments)`, which is linear in `x`. Equal ones are compiled once,
    so all has to be hashable."""

    fn: Callable[..., Array]
    arguments: tuple[tuple[str, Any], ...]

    fused: Callable[..., Array] | None = None
    """The same product, by one dense array. Derivatives in the base are those of `fn`.
    Without it there are none: what `fn` makes of the base is frozen."""

    fuses_from: float = 0
    """The number of tokens from which `fused` is faster on a CPU. With 0 it is the
    choice everywhere."""

    factor: int = 0
    """The index of a leaf without which `fused` cannot form the sum."""

    token_size: int = 1
    """The number of entries of `x` that make one token."""

    def __call__(self, base: Any, x: Array, is_fused: bool) -> Array:
        arguments = dict(self.arguments)
        if self.fused is not None and is_fused:
            return self.fused(base, x, **arguments)
        return self.fn(base, x, **arguments)


def unpack(product: Product, base: Any, x: Array) -> Array:
    """`product(base, x)`. What it makes of the base is made again where a derivative
    needs it, and not kept until then: what is kept is the base, which is there
    anyway."""
    leaves, treedef = jax.tree.flatten(base)
    if has_typed_mesh(x, *leaves):
        # On meshes that types speak of, JAX knows best.
        if product.fused is not None:
            return product(base, x, False)
        return jax.checkpoint(lambda base, x: product(base, x, False))(base, x)
    out = jax.eval_shape(lambda base, x: product(base, x, False), base, x)
    return _unpack.bind(x, *leaves, run=_Forward(product, treedef, out))


def trace_unpack(primitive: Primitive, params: dict[str, Any], avals: Any) -> Any:
    """The program of an equation that `unpack` has made for a packed base, with the
    dense array; `None` for other equations. `avals` are those of its operands."""
    is_packed = primitive is _unpack and params["run"].origin.fused is None
    return _trace(params, avals) if is_packed else None


def trace_sum(primitive: Primitive, params: dict[str, Any], avals: Any) -> Any:
    """The same for the sum of base and update, which are apart unless the sum is asked
    for."""
    is_sum = primitive is _unpack and params["run"].origin.fused is not None
    return _trace(params, avals) if is_sum else None


def _trace(params: dict[str, Any], avals: Any) -> Any:
    return jax.make_jaxpr(functools.partial(_run, **params))(*avals)


class _Run(abc.ABC):
    """What the primitive computes, of an activation and the leaves of the base."""

    @property
    @abc.abstractmethod
    def origin(self) -> Product:
        """The product that it is made of."""

    @abc.abstractmethod
    def find_result(self) -> jax.ShapeDtypeStruct:
        """The shape and the dtype of what it returns."""

    @abc.abstractmethod
    def __call__(self, x: Array, *leaves: Array, is_fused: bool = False) -> Array:
        """Linear in `x`."""

    @abc.abstractmethod
    def count_tokens(self, shape: tuple[int, ...]) -> int:
        """The number of tokens that meet the same base, if `x` is of this shape."""

    @abc.abstractmethod
    def find_batched(self) -> frozenset[int]:
        """The leaves of which `vmap` gives each example its own."""

    def transpose(self, x: Any) -> "_Run":
        """The transpose in the activation, which is of this shape and dtype."""
        return _Transposed(self, jax.ShapeDtypeStruct(x.shape, x.dtype))


@dataclasses.dataclass(frozen=True)
class _Forward(_Run):
    product: Product
    treedef: Any
    result: jax.ShapeDtypeStruct

    @property
    def origin(self) -> Product:
        return self.product

    def __call__(self, x: Array, *leaves: Array, is_fused: bool = False) -> Array:
        return self.product(self.treedef.unflatten(leaves), x, is_fused)

    def find_result(self) -> jax.ShapeDtypeStruct:
        return self.result

    def count_tokens(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.product.token_size

    def find_batched(self) -> frozenset[int]:
        return frozenset()


@dataclasses.dataclass(frozen=True)
class _Transposed(_Run):
    run: _Run
    x: jax.ShapeDtypeStruct
    """What the activation of `run` is like."""

    @property
    def origin(self) -> Product:
        return self.run.origin

    def __call__(self, x: Array, *leaves: Array, is_fused: bool = False) -> Array:
        # Not `jax.linear_transpose`: products of narrow arrays have a rule for their
        # tangents, which are products of another kind.
        zeros = jnp.zeros(self.x.shape, self.x.dtype)
        _, pull = jax.vjp(lambda x: self.run(x, *leaves, is_fused=is_fused), zeros)
        return pull(x)[0]

    def find_result(self) -> jax.ShapeDtypeStruct:
        return self.x

    def count_tokens(self, shape: tuple[int, ...]) -> int:
        return self.run.count_tokens(self.x.shape)

    def find_batched(self) -> frozenset[int]:
        return self.run.find_batched()

    def transpose(self, x: Any) -> _Run:
        return self.run


@dataclasses.dataclass(frozen=True)
class _Batched(_Run):
    run: _Run
    in_axes: tuple[int | None, ...]
    """The axis of the activation, and those of the leaves."""
    size: int
    """That of the axis."""

    @property
    def origin(self) -> Product:
        return self.run.origin

    def __call__(self, x: Array, *leaves: Array, is_fused: bool = False) -> Array:
        def run(x: Array, *leaves: Array) -> Array:
            return self.run(x, *leaves, is_fused=is_fused)

        return jax.vmap(run, self.in_axes)(x, *leaves)

    def find_result(self) -> jax.ShapeDtypeStruct:
        inner = self.run.find_result()
        return jax.ShapeDtypeStruct((self.size, *inner.shape), inner.dtype)

    def count_tokens(self, shape: tuple[int, ...]) -> int:
        x_axis, *leaf_axes = self.in_axes
        if x_axis is None or any(axis is not None for axis in leaf_axes):
            return 0
        rest = (*shape[:x_axis], *shape[x_axis + 1 :])
        return shape[x_axis] * self.run.count_tokens(rest)

    def find_batched(self) -> frozenset[int]:
        own = {i for i, axis in enumerate(self.in_axes[1:]) if axis is not None}
        return self.run.find_batched() | own


def _run(x: Array, *leaves: Array, run: _Run) -> Array:
    return run(x, *leaves, is_fused=run.origin.fuses_from == 0)


def _run_in_turn(x: Array, *leaves: Array, run: _Run) -> Array:
    """The same, for the compiler for the CPU, with a base that depends on `x`, and with
    one dense array where that is faster.

    The compiler would make the dense arrays of all layers at the start, since they need
    nothing but bases, and keep them until they are used: 2.5 times the temporary
    memory, in place of one buffer that stays in the cache. An optimization barrier does
    not stop it, as the compiler drops those before it orders the operations. So the
    base would be another one if something were true of `x` that never is.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
        return _run(x, *leaves, run=run)
    is_fused = run.count_tokens(x.shape) >= run.origin.fuses_from
    never = x[(0,) * x.ndim] > jnp.asarray(jnp.inf, x.dtype)
    dependent = list(leaves)
    for i in _find_dependent(leaves, run, is_fused):
        dependent[i] = _change_if(never, leaves[i])
    return run(x, *dependent, is_fused=is_fused)


def _change_if(never: Array, leaf: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf ^ never.astype(leaf.dtype)
    return jnp.where(never, -leaf, leaf)


def _find_dependent(leaves: Sequence[Array], run: _Run, is_fused: bool) -> set[int]:
    """The leaves that are to depend on the activation."""
    if run.origin.fused is None:
        # Those that are unpacked.
        return {i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.integer)}
    found = {run.origin.factor} if is_fused else set()
    batched = run.find_batched()
    if all(i >= run.origin.factor for i in batched):
        # Of a shared base each example has its own factors, picked by an index. They
        # too would all be copied at the start: now each layer's are when it needs them.
        found |= batched
    return found


def _lower_for_cpu(context: Any, *operands: Any, run: _Run) -> Any:
    # On several devices, one entry of `x` would have to be sent around, and every
    # device would form the whole sum.
    program = _run_in_turn if is_for_one_device(context) else _run
    return mlir.lower_fun(program, multiple_results=False)(context, *operands, run=run)


def _abstract(x: Any, *leaves: Any, run: _Run) -> Any:
    result = run.find_result()
    return x.update(shape=result.shape, dtype=result.dtype, weak_type=False)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, run: _Run) -> Any:
    (x, *leaves), (x_dot, *leaf_dots) = primals, tangents
    out = _unpack.bind(x, *leaves, run=run)
    terms = []
    if type(x_dot) is not ad.Zero:
        terms.append(_unpack.bind(x_dot, *leaves, run=run))
    moving = [i for i, dot in enumerate(leaf_dots) if type(dot) is not ad.Zero]
    if moving and run.origin.fused is not None:

        def in_leaves(*some: Array) -> Array:
            return run(x, *(dict(enumerate(leaves)) | dict(zip(moving, some))).values())

        _, term = jax.jvp(
            in_leaves, [leaves[i] for i in moving], [leaf_dots[i] for i in moving]
        )
        terms.append(term)
    if not terms:
        return out, ad.Zero(jax.typeof(out))
    return out, sum(terms[1:], start=terms[0])


def _transpose(cotangent: Any, x: Any, *leaves: Any, run: _Run) -> list[Any]:
    nothing = [None] * len(leaves)
    if type(cotangent) is ad.Zero:
        return [None, *nothing]
    return [_unpack.bind(cotangent, *leaves, run=run.transpose(x.aval)), *nothing]


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, run: _Run) -> Any:
    sizes = [x.shape[i] for x, i in zip(operands, dims) if i is not None]
    return _unpack.bind(*operands, run=_Batched(run, tuple(dims), sizes[0])), 0


_unpack = Primitive("lorax_unpack")
_unpack.def_impl(jax.jit(_run, static_argnames="run"))
_unpack.def_abstract_eval(_abstract)
ad.primitive_jvps[_unpack] = _jvp
ad.primitive_transposes[_unpack] = _transpose
batching.primitive_batchers[_unpack] = _batch
mlir.register_lowering(_unpack, mlir.lower_fun(_run, multiple_results=False))
mlir.register_lowering(_unpack, _lower_for_cpu, platform="cpu")
