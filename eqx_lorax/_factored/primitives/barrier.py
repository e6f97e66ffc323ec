"""A way around a fault of XLA's compiler for the CPU."""

import jax.lax as lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def apart_on_cpu(x: Array) -> Array:
    """`x`, whose axes the compiler for the CPU may not move any more.

    It decides early which products of bfloat16 arrays it can accumulate in float32 as
    they are. If it then folds a transpose of the first operand into one of them, as
    after an activation of `w @ x` below `vmap`, it has no code for that product, and
    running it ends with "UNIMPLEMENTED: Unsupported element type for DotThunk". Casts
    to float32 would help too, but hold a wide copy of the frozen base.
    """
    return _apart.bind(x)


_apart = Primitive("lorax_apart_on_cpu")
_apart.def_impl(lambda x: x)
_apart.def_abstract_eval(lambda x: x)
ad.deflinear2(_apart, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_apart] = lambda xs, dims: (apart_on_cpu(*xs), *dims)
mlir.register_lowering(_apart, mlir.lower_fun(lambda x: x, multiple_results=False))
mlir.register_lowering(
    _apart,
    mlir.lower_fun(lax.optimization_barrier, multiple_results=False),
    platform="cpu",
)
