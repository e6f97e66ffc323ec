"""How the factors of a fresh adapter start. `b` is always zero, so that a fresh adapter
adds exactly nothing. The choice here is for `a`."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PRNGKeyArray

from .._shared import as_array


Initialiser: TypeAlias = Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], Array]
Init: TypeAlias = Literal["uniform", "gaussian"] | Initialiser
"""How the factor `a` starts: by a name, or by a function `(key, shape, dtype) -> array`
as in `jax.nn.initializers`."""


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
        drawn = jax.lax.complex(*parts)
        drawn = drawn / as_array(math.sqrt(2), drawn.dtype)
    else:
        drawn = draw(key, shape, max(jnp.dtype(dtype), jnp.float32, key=_width))
    return (drawn * as_array(size, drawn.dtype)).astype(dtype)


def _symmetric_uniform(
    key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
) -> Array:
    low, high = as_array(-1, dtype), as_array(1, dtype)
    return jr.uniform(key, shape, dtype, low, high)


def _width(dtype: DTypeLike) -> int:
    return jnp.dtype(dtype).itemsize


def key_for(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key that depends on `key` and on `path` alone, so that another target does not
    change the factors of this one."""
    words = [as_array(word, jnp.uint32) for word in words_of(path)]
    return key_for_words(key, words)


def key_for_words(key: PRNGKeyArray, words: Sequence[Any] | Array) -> PRNGKeyArray:
    """As `key_for`, given the two `words_of` a path."""
    return jr.fold_in(jr.fold_in(key, words[0]), words[1])


def words_of(path: str) -> tuple[int, int]:
    """Two numbers of 32 bits that stand for a path."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4]), int.from_bytes(digest[4:])


def check_key(key: Any) -> None:
    """**Raises:**

    `TypeError` if `key` is none, `ValueError` if it is several.
    """
    if not isinstance(key, jax.Array | np.ndarray) or not (
        _is_typed(key) or key.dtype == jnp.uint32
    ):
        raise TypeError(f"`key={key!r}` is not a key. Pass `key=jax.random.key(seed)`.")
    if not is_one_key(key):
        raise ValueError(
            f"`key` has shape {key.shape}: one key is needed, not several. Pass one of "
            "those that `jax.random.split` gave, or use `jax.vmap` over them."
        )


def is_one_key(key: Array | np.ndarray) -> bool:
    """Whether an array of keys, typed or not, is a single one."""
    return key.ndim == (0 if _is_typed(key) else 1)


def _is_typed(key: Array | np.ndarray) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
