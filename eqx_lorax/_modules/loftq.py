"""Adapters that start from what quantising their base has rounded away."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Sharding
from jaxtyping import Array

from .._bases import QuantisedArray
from .._factored import dense, stands_for_array
from .._methods import (
    AbstractStart,
    base_of,
    Fresh,
    is_weight,
    LoraWeight,
    RelativeLoraWeight,
    share_out,
    unfuse,
)
from .._shared import is_abstract, is_traced, known_sharding, list_some
from .._trees import join_path, Place, Places


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoftQ(AbstractStart):
    """The best approximation of what quantising the base has rounded away, for adapters
    on a base that stays as it is.

    The adapted model is not the quantised one, but nearer to the original. This is one
    step of LoftQ. Where the base may be one of this adapter's own, there are more of
    them, by `loftq=` of `lorax.quantise`.

    !!! example

        ```python
        quantised = lorax.quantise(model)
        adapted = lorax.loraify(quantised, init=lorax.LoftQ(model), rank=8, key=key)
        ```

    **Arguments:**

    - `model`: The model before it was quantised, or a part of it with the same paths.

    ??? cite

        [LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language
        Models](https://arxiv.org/abs/2310.08659), algorithm 1 with one step. PEFT has
        this as `replace_lora_weights_loftq`.
    """

    model: Any
    changes_base = False

    def __call__(self, fresh: Fresh) -> tuple[Array, Array]:
        original = self._find(fresh)
        whole = dataclasses.replace(fresh, w=original, base=original).matrices()
        return _find_factors(fresh, whole - fresh.matrices())

    def __repr__(self) -> str:
        return f"LoftQ({type(self.model).__name__})"

    def _find(self, fresh: Fresh) -> Any:
        arrays = {x.dotted: x.node for x in Places(self.model).all if x.is_array}
        if fresh.name not in arrays:
            raise ValueError(
                f"`LoftQ(model)`: `model` has no {fresh.name}, but "
                f"{list_some([*arrays])}. Pass the model that was quantised."
            )
        found = arrays[fresh.name]
        if tuple(found.shape) != fresh.shape:
            raise ValueError(
                f"`LoftQ(model)`: {fresh.name} has shape {tuple(found.shape)} in "
                f"`model`, and {fresh.shape} here. Pass the model that was quantised."
            )
        if stands_for_array(base_of(found)):
            raise ValueError(
                f"`LoftQ(model)`: {fresh.name} of `model` is quantised too. Pass the "
                "model from before `lorax.quantise`."
            )
        return found


def check_can_fit(place: Place) -> None:
    """**Raises:**

    `TypeError` if there is an adapter that base and factors cannot be fitted for.
    """
    weight = unfuse(place.node)
    is_lora = isinstance(weight, LoraWeight | RelativeLoraWeight)
    if is_lora and not is_weight(weight.w):
        return
    what = "an adapter on another" if is_lora else f"a {type(weight).__name__}"
    raise TypeError(
        f"`loftq` is for plain LoRA, and there is {what} at {join_path(place.path)}. "
        "Quantise without it, before `lorax.loraify`, to which "
        "`init=lorax.LoftQ(model)` may be passed; or leave this out with `exclude`."
    )


def fit_to_rounding(
    place: Place, quantise: Callable[[Any], QuantisedArray], steps: int
) -> LoraWeight:
    """A weight on a quantised base, near to the weight at `place` as it is.

    **Arguments:**

    - `place`: That of a weight for which `check_can_fit` is true.
    - `quantise`: Makes the base of an array.
    - `steps`: How often base and factors are found in turn, given each other.
    """
    weight = unfuse(place.node)
    base, b, a = weight.w, weight.b, weight.a
    settings = dict(
        alpha=weight.alpha,
        rows=weight.rows,
        columns=weight.columns,
        rank_stabilised=weight.rank_stabilised,
    )
    if is_abstract(weight):
        return LoraWeight(quantise(base), b, a, **settings)
    fresh = Fresh(
        place.dotted,
        base,
        base,
        weight.rank,
        dtype=b.dtype,
        # Nothing is random.
        key=jr.key(0),
        placement=(known_sharding(b), known_sharding(a)),
        **settings,
    )
    whole = _form(weight, base)
    new: Any = base
    # Factors that did not start at zero, as PiSSA's, are what is to be trained.
    keeps_start = isinstance(weight, RelativeLoraWeight)
    for step in range(1, steps + 1):
        rest = _form(LoraWeight(whole, -b, a, **settings), base)
        new = quantise(rest).astype(base.dtype)
        if not (keeps_start and step == steps):
            rounded = dataclasses.replace(fresh, w=new, base=new).matrices()
            of_whole = dataclasses.replace(fresh, w=whole, base=whole)
            b, a = of_whole.derive_factors(lambda w: _find_factors(fresh, w - rounded))
    return LoraWeight(new, b, a, **settings)


def _find_factors(fresh: Fresh, w: Array) -> tuple[Array, Array]:
    """The factors whose product, times the scale, is nearest to `w`."""
    with jax.default_matmul_precision("highest"):
        u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return share_out(fresh, u, s, v, slice(0, fresh.rank))


def _form(weight: Any, base: Any) -> Array:
    """The array that `weight` stands for, not rounded, placed as `base` is."""
    if is_traced(weight):
        return dense(weight.factored())
    return _compile(known_sharding(base))(weight)


@functools.lru_cache(maxsize=1024)
def _compile(sharding: Sharding | None) -> Callable[..., Array]:
    return jax.jit(lambda weight: dense(weight.factored()), out_shardings=sharding)
