"""How the factors of a fresh adapter start. `b` is always zero, so that a fresh adapter
adds exactly nothing. The choice here is for `a`."""

import dataclasses
import difflib
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
from .starts import AbstractStart, STARTS


Initialiser: TypeAlias = Callable[[PRNGKeyArray, tuple[int, ...], DTypeLike], Array]
Init: TypeAlias = (
    Literal["uniform", "gaussian", "orthogonal", "pissa", "olora", "milora"]
    | Initialiser
    | AbstractStart
)
"""How the factors start: by a name; by a function `(key, shape, dtype) -> array` for
`a`, as in `jax.nn.initializers`; or by a start of both, such as `lorax.Pissa`."""


def resolve_init(init: Any) -> Init:
    """`init`, with a start in the place of its name.

    **Raises:**

    `ValueError` if it is unknown.
    """
    if isinstance(init, str) and init in STARTS:
        return STARTS[init]
    if callable(init) or init in ("uniform", "gaussian"):
        return init  # pyright: ignore[reportReturnType]
    known = ["uniform", "gaussian", *STARTS]
    near = difflib.get_close_matches(str(init), known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"`init={init!r}` is unknown.{hint} Pass one of {', '.join(map(repr, known))}, "
        "a start such as `lorax.Pissa(iterations=4)`, or a function "
        "`(key, shape, dtype) -> array` such as `jax.nn.initializers.normal(0.02)`."
    )


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
        assert not isinstance(init, AbstractStart)
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


@dataclasses.dataclass(frozen=True)
class Uniform:
    """An initialiser: uniform on `±bound`. Equal ones share what was compiled."""

    bound: float

    def __call__(
        self, key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Array:
        drawn = initial_factor(key, "uniform", shape, dtype, 1, 1, False)
        return drawn * as_array(self.bound, drawn.dtype)


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
