"""Names of activations, for `jax.checkpoint`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array


_PRODUCT = "lorax_product"
_HIDDEN = "lorax_hidden"


def name_product(y: Array) -> Array:
    """The output of an adapted or quantised product, base and update together."""
    # Outside a trace nothing asks for the name, and giving it takes time.
    return checkpoint_name(y, _PRODUCT) if isinstance(y, jax.core.Tracer) else y


def name_hidden(x: Array) -> Array:
    """The activation between the two factors."""
    return checkpoint_name(x, _HIDDEN)


def checkpoint_policy(*names: str, attention: bool = True) -> Callable[..., bool]:
    """A policy for `jax.checkpoint` and `equinox.filter_checkpoint` that keeps what is
    expensive and computes again what is cheap, such as norms and activation functions.

    Kept are the outputs of products and convolutions. Of an adapted layer that is the
    sum of base and update, once, and the `rank` numbers a token between the factors.
    JAX's own policies do not know that the sum is what the rest of the model needs.

    !!! example

        ```python
        block = eqx.filter_checkpoint(block, policy=lorax.checkpoint_policy())
        ```

    **Arguments:**

    - `names`: More names to keep, that the model gives to activations by
        `jax.ad_checkpoint.checkpoint_name`. An adapted layer names its output
        `"lorax_product"`, and what is between the factors `"lorax_hidden"`.
    - `attention`: Whether products of activations with each other are kept too: those
        with batch axes, such as the scores of attention, which grow with the square of
        the length.

    **Returns:**

    A function for the argument `policy`. Those of equal arguments are equal.

    **Raises:**

    `TypeError` if a name is no string: the policy is what this returns, so it takes no
    function.

    ??? cite

        [Training Deep Nets with Sublinear Memory Cost](https://arxiv.org/abs/1604.06174)
    """
    for name in names:
        if not isinstance(name, str):
            raise TypeError(
                f"`{name!r}` is no name. Make the policy first: `eqx.filter_checkpoint("
                "fn, policy=lorax.checkpoint_policy())`."
            )
    return _Policy((_PRODUCT, _HIDDEN, *names), attention)


@dataclasses.dataclass(frozen=True)
class _Policy:
    names: tuple[str, ...]
    keeps_attention: bool

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> bool:
        match primitive.name:
            case "dot_general" | "lorax_multiply_vector":
                _, batch = params["dimension_numbers"]
                return self.keeps_attention or not batch[0]
            case "conv_general_dilated":
                return True
        keep_named = jax.checkpoint_policies.save_only_these_names(*self.names)
        return keep_named(primitive, *avals, **params)
