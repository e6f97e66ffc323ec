"""Names of activations, for `jax.checkpoint`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array


PRODUCT = "lorax_product"
HIDDEN = "lorax_hidden"

_PRODUCTS = ("dot_general", "conv_general_dilated")


def name_product(y: Array) -> Array:
    """The output of an adapted or quantised product, base and update together."""
    return checkpoint_name(y, PRODUCT)


def name_hidden(x: Array) -> Array:
    """The activation between the two factors."""
    return checkpoint_name(x, HIDDEN)


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

    A function for the argument `policy`.

    ??? cite

        [Training Deep Nets with Sublinear Memory Cost](https://arxiv.org/abs/1604.06174)
    """
    is_named = jax.checkpoint_policies.save_only_these_names(PRODUCT, HIDDEN, *names)

    def policy(primitive: Any, *avals: Any, **params: Any) -> Any:
        if primitive.name in _PRODUCTS:
            _, batch = params["dimension_numbers"][:2]
            has_batch = primitive.name == "dot_general" and bool(batch[0])
            return attention or not has_batch
        return is_named(primitive, *avals, **params)

    return policy
