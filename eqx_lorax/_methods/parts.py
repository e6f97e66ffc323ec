"""The two parts of a model: `params`, which is the adapter, and `frozen`."""

from collections.abc import Iterator
from typing import Any

import jax

from .._shared import axes_from_end, is_array
from .missing import list_missing
from .weight import AbstractLoraWeight, base_of, is_weight


def list_weights(tree: Any) -> list[AbstractLoraWeight]:
    """The weights in a tree."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_weight) if is_weight(x)]


def check_whole(
    model: Any, call: str, name: str = "model", *, or_params: bool = False
) -> None:
    """**Arguments:**

    - `call`: The call that is meant, with `{}` for the model.
    - `or_params`: Whether the adapter alone will do too.

    **Raises:**

    `ValueError` if `model` is only what `lorax.partition` called `params` or `frozen`.
    """
    weights = list_weights(model)
    if any(base_of(weight) is None for weight in weights):
        if or_params:
            return
        what = "an adapter without its base, the `params`"
    elif any(list_missing(weight) for weight in weights):
        what = "a base without its adapters, the `frozen`"
    else:
        return
    fix = call.format("lorax.combine(params, frozen)")
    raise ValueError(f"`{name}` is {what} of `lorax.partition`. Call `{fix}`.")


def check_frozen(frozen: Any, call: str) -> None:
    """**Raises:**

    `ValueError` if `frozen` is what `lorax.partition` called `params`.
    """
    if any(base_of(weight) is None for weight in list_weights(frozen)):
        raise ValueError(
            "`frozen` is an adapter without its base, the `params` of "
            f"`lorax.partition`. Call `{call.format('frozen')}` with its second result."
        )


def find_misfits(weight: Any) -> Iterator[str]:
    """A line for each array of a weight that does not fit its base or the others."""
    base = tuple(weight.w.shape)
    try:
        axes = weight.array_axes()
    except IndexError:
        yield f"is for more axes than a base of shape {base} has"
        return
    sizes: dict[Any, int] = dict(zip(axes_from_end(len(base)), base))
    for name, labels in axes.items():
        array = getattr(weight, name)
        if not is_array(array):
            continue
        shape = tuple(array.shape)
        if len(shape) == len(labels):
            # The first array with an axis of the rank gives its size.
            new = {x: size for x, size in zip(labels, shape) if x not in sizes}
            sizes |= new
        wanted = tuple(sizes.get(label, "any") for label in labels)
        if shape != wanted:
            text = ", ".join(map(str, wanted)) + "," * (len(wanted) == 1)
            yield f"`{name}` has shape {shape}; upon the base {base} it is ({text})"
