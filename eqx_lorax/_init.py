"""How the factors of a fresh adapter start. `b` is always zero, so that a fresh adapter
adds exactly nothing; what is chosen here is `a`."""

import hashlib
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray


Initialiser: TypeAlias = Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], Array]
Init: TypeAlias = Literal["uniform", "gaussian"] | Initialiser


def initial_factor(
    key: PRNGKeyArray,
    init: Init,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    rank: int,
    fan_in: int,
    is_lookup: bool,
) -> Array:
    """The initial `a`, drawn in float32 or wider and cast to `dtype`.

    **Arguments:**

    - `init`: `"uniform"` is `U(±1 / sqrt(fan_in))`, `"gaussian"` is `N(0, 1 / rank²)`:
        PEFT's `init_lora_weights=True` and `"gaussian"`. Anything else is called as
        those of `jax.nn.initializers` are.
    - `fan_in`: How many inputs one element of the rank axis sums over.
    - `is_lookup`: Whether the weight is looked up in. Both named initialisers then are
        `N(0, 1)`, as PEFT's are.
    """
    if not isinstance(init, str):
        return init(key, shape, dtype).astype(dtype)
    draw = jr.normal if init == "gaussian" or is_lookup else _symmetric_uniform
    if is_lookup:
        size = 1.0
    elif init == "gaussian":
        size = 1 / rank
    else:
        size = 1 / math.sqrt(fan_in)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real = jnp.finfo(dtype).dtype
        parts = [draw(part, shape, real) for part in jr.split(key)]
        drawn = jax.lax.complex(*parts) / math.sqrt(2)
    else:
        drawn = draw(key, shape, max(jnp.dtype(dtype), jnp.float32, key=_width))
    return (size * drawn).astype(dtype)


def _symmetric_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Array:
    return jr.uniform(key, shape, dtype, minval=-1, maxval=1)


def _width(dtype: DTypeLike) -> int:
    return jnp.dtype(dtype).itemsize


def key_for(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key that depends on `key` and on `path` alone, so that another target does not
    change the factors of this one."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    for word in (digest[:4], digest[4:]):
        key = jr.fold_in(key, int.from_bytes(word))
    return key
