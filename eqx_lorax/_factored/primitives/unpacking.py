"""Products with the dense form of a packed base, which is made where it is used.

Plain derivatives would keep the dense array from the forward pass to the backward pass.
Here the product is a primitive of the packed base and the activation, linear in the
latter. Its transpose is such a product again, and so makes the dense array anew.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, get_abstract_mesh
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Product:
    """`fn(base, x, **arguments)`, which is linear in `x` and takes no derivative in the
    base. Equal ones are compiled once, so all has to be hashable."""

    fn: Callable[..., Array]
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, base: Any, x: Array) -> Array:
        return self.fn(base, x, **dict(self.arguments))


def unpack(product: Product, base: Any, x: Array) -> Array:
    """`product(base, x)`. What it makes of the base is made again where a derivative
    needs it, and not kept until then: what is kept is the base, which is there
    anyway."""
    leaves, treedef = jax.tree.flatten(base)
    if _is_typed(x, *leaves):
        # On meshes that types speak of, JAX knows best.
        return jax.checkpoint(product)(base, x)
    return _unpack.bind(x, *leaves, run=_Forward(product, treedef))


def _is_typed(*arrays: Any) -> bool:
    meshes = [get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    kinds = {kind for mesh in meshes for kind in mesh.axis_types}
    return bool(kinds - {AxisType.Auto})


def trace_unpack(equation: Any) -> Any:
    """The program of an equation that `unpack` has made, which works with the dense
    array; `None` for other equations."""
    if equation.primitive is not _unpack:
        return None
    avals = [variable.aval for variable in equation.invars]
    return jax.make_jaxpr(equation.params["run"])(*avals)


class _Run(abc.ABC):
    """What the primitive computes, of an activation and the leaves of the base."""

    @abc.abstractmethod
    def __call__(self, x: Array, *leaves: Array) -> Array:
        """Linear in `x`."""

    @abc.abstractmethod
    def transpose(self, x: Any) -> "_Run":
        """The transpose in the activation, which is of this shape and dtype."""


@dataclasses.dataclass(frozen=True)
class _Forward(_Run):
    product: Product
    treedef: Any

    def __call__(self, x: Array, *leaves: Array) -> Array:
        return self.product(self.treedef.unflatten(leaves), x)

    def transpose(self, x: Any) -> _Run:
        return _Transposed(self, tuple(x.shape), x.dtype)


@dataclasses.dataclass(frozen=True)
class _Transposed(_Run):
    run: _Run
    shape: tuple[int, ...]
    dtype: Any

    def __call__(self, x: Array, *leaves: Array) -> Array:
        # Not `jax.linear_transpose`: products of narrow arrays have a rule for their
        # tangents, which are products of another kind.
        zeros = jnp.zeros(self.shape, self.dtype)
        _, pull = jax.vjp(lambda x: self.run(x, *leaves), zeros)
        return pull(x)[0]

    def transpose(self, x: Any) -> _Run:
        return self.run


@dataclasses.dataclass(frozen=True)
class _Batched(_Run):
    run: _Run
    in_axes: tuple[int | None, ...]
    """The axis of the activation, and those of the leaves."""

    def __call__(self, x: Array, *leaves: Array) -> Array:
        return jax.vmap(self.run, self.in_axes)(x, *leaves)

    def transpose(self, x: Any) -> _Run:
        return _Transposed(self, tuple(x.shape), x.dtype)


def _run(x: Array, *leaves: Array, run: _Run) -> Array:
    return run(x, *leaves)


def _run_in_turn(x: Array, *leaves: Array, run: _Run) -> Array:
    """The same, with a base that depends on `x`, for the compiler for the CPU.

    It would make the dense arrays of all layers at the start, since they need nothing
    but bases, and keep them until they are used: 2.5 times the temporary memory, in
    place of one buffer that stays in the cache. An optimization barrier does not stop
    it, as the compiler drops those before it orders the operations. So the codes are
    combined with a zero of which it cannot know that it is one.
    """
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    # On several devices, one entry of `x` would have to be sent around.
    if not is_real or x.size == 0 or jax.local_device_count("cpu") > 1:
        return run(x, *leaves)
    zero = x[(0,) * x.ndim] > jnp.asarray(jnp.inf, x.dtype)

    def depend(leaf: Array) -> Array:
        is_codes = jnp.issubdtype(leaf.dtype, jnp.integer)
        return leaf ^ zero.astype(leaf.dtype) if is_codes else leaf

    return run(x, *map(depend, leaves))


def _abstract(x: Any, *leaves: Any, run: _Run) -> Any:
    out = jax.eval_shape(run, x, *leaves)
    return x.update(shape=out.shape, dtype=out.dtype, weak_type=False)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, run: _Run) -> Any:
    x, *leaves = primals
    out = _unpack.bind(x, *leaves, run=run)
    if type(tangents[0]) is ad.Zero:
        return out, ad.Zero(jax.typeof(out))
    return out, _unpack.bind(tangents[0], *leaves, run=run)


def _transpose(cotangent: Any, x: Any, *leaves: Any, run: _Run) -> list[Any]:
    nothing = [None] * len(leaves)
    if type(cotangent) is ad.Zero:
        return [None, *nothing]
    return [_unpack.bind(cotangent, *leaves, run=run.transpose(x.aval)), *nothing]


def _batch(operands: Sequence[Any], dims: Sequence[Any], *, run: _Run) -> Any:
    return _unpack.bind(*operands, run=_Batched(run, tuple(dims))), 0


_unpack = Primitive("lorax_unpack")
_unpack.def_impl(jax.jit(_run, static_argnames="run"))
_unpack.def_abstract_eval(_abstract)
ad.primitive_jvps[_unpack] = _jvp
ad.primitive_transposes[_unpack] = _transpose
batching.primitive_batchers[_unpack] = _batch
mlir.register_lowering(_unpack, mlir.lower_fun(_run, multiple_results=False))
mlir.register_lowering(
    _unpack, mlir.lower_fun(_run_in_turn, multiple_results=False), platform="cpu"
)
