"""Weights of which parts are missing, as in the two parts of `lorax.partition`."""

from typing import Any

import jax

from .._factored import stands_for_array


def is_missing(w: Any) -> bool:
    """Whether a weight with the base `w` has none: `None`, or the structure of a
    quantised array, or of a weight beneath, without its arrays."""
    return w is None or stands_for_array(w) and not jax.tree.leaves(w)


def list_missing(weight: Any) -> list[str]:
    """The names of the arrays that a weight lacks, apart from its base."""
    names = weight.array_axes()
    return [name for name in names if getattr(weight, name) is None]


def missing_base(weight: Any) -> ValueError:
    """The error where the base of a weight is needed and missing."""
    return ValueError(
        f"This {type(weight).__name__} has no base: it is of an adapter alone, the "
        "`params` of `lorax.partition`. Use the whole model, "
        "`lorax.combine(params, frozen)` or `lorax.attach(model, params)`."
    )


def missing_factors(weight: Any) -> ValueError:
    """The error where the factors of a weight are needed and missing."""
    return ValueError(
        f"This {type(weight).__name__} has no factors: it is of the `frozen` part of "
        "`lorax.partition`. Use the whole model, `lorax.combine(params, frozen)`."
    )
