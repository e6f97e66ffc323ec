"""Adapters of any method as plain LoRA."""

import functools
from collections.abc import Callable
from typing import Any, Literal, overload, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._factored import Factored
from .._methods import AbstractLoraWeight, check_whole, is_weight, LoraWeight, unfuse
from .._shared import zeros
from .._trees import Place, Places, rebuild
from .compress import (
    as_matrices,
    compress,
    relative_error,
    split,
    warn_of_loss,
    with_matrices,
)
from .updates import bare, dense_update, fold, split_layers


_Model = TypeVar("_Model")


@overload
def as_lora(
    model: _Model, rank: int | None = None, *, return_error: Literal[False] = False
) -> _Model: ...


@overload
def as_lora(
    model: _Model, rank: int | None = None, *, return_error: Literal[True]
) -> tuple[_Model, dict[str, Array]]: ...


def as_lora(model: Any, rank: int | None = None, *, return_error: bool = False) -> Any:
    """The model with its adapters, of whatever method, as plain LoRA: for servers and
    files that know nothing else.

    A method whose update is a product of two factors, once its trained parts are
    multiplied into them, *is* LoRA of some rank, and is converted exactly: VeRA, LoHa,
    LoKr, AdaLoRA and so on, and factors that are measured from where they started, as
    PiSSA's. Adapters on top of adapters become one, whose rank is the sum. The rank is
    at most the smaller side of the weight.

    A method that scales the base too, as DoRA and IA³ do, has the update
    `gain * (W + scale * b · a) - W`, of full rank. It needs a `rank`, and is then
    converted by the singular value decomposition of this dense matrix, for one layer at
    a time. It is exact only where the rank is the smaller side.

    !!! example

        ```python
        plain = lorax.as_lora(model)
        lorax.peft.save("adapter", plain, names=names)
        ```

    **Arguments:**

    - `model`: A model with adapters, or a tree of parameters of `lorax.init_lora`.
    - `rank`: The largest rank that a weight may have. What has a larger one is replaced
        by the best approximation of this rank in the Frobenius norm, computed by QR
        decompositions of the factors and without forming the update, where there is no
        gain.
    - `return_error`: Whether to return the errors too.

    **Returns:**

    The model. Each adapted weight is a `lorax.LoraWeight` on the base array itself,
    with factors in the dtypes that they had. With `return_error` also a
    dictionary from the path of each weight to what it has lost, relative to the
    Frobenius norm of its update (over all layers of a stack); it is zero where nothing
    was approximated. Without it, a loss of more than a percent is told by a
    `UserWarning`.

    **Raises:**

    `ValueError` if there is no adapter, if `model` is a part of `lorax.partition`, or
    if a method scales its base and there is no `rank`.

    ??? cite

        Eckart and Young, *The approximation of one matrix by another of lower rank*,
        1936.
    """
    check_whole(model, "lorax.as_lora({})")
    _check_rank(rank)
    places = [place for place in Places(model).all if is_weight(place.node)]
    if not places:
        raise ValueError(
            "`model` has no adapters to convert. Pass a model that went through "
            "`lorax.loraify`, or parameters of `lorax.init_lora`."
        )
    edits: dict[tuple[int, ...], Callable[[Any], LoraWeight]] = {}
    errors: dict[str, Array] = {}
    for place in places:
        weight, errors[place.dotted] = _convert(place, rank)
        edits[place.indices] = lambda _, weight=weight: weight
    converted = rebuild(model, edits)
    if return_error:
        return converted, errors
    fix = "A larger `rank` keeps more; `return_error=True` returns this."
    warn_of_loss(errors, "the converted adapters", fix)
    return converted


def _check_rank(rank: Any) -> None:
    is_integer = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if rank is not None and not is_integer:
        raise TypeError(f"`rank={rank!r}` must be an integer, or `None`.")
    if rank is not None and rank < 1:
        raise ValueError(f"`rank={rank}` must be at least 1; `None` keeps the ranks.")


def _convert(place: Place, rank: int | None) -> tuple[LoraWeight, Array]:
    weight = unfuse(place.node)
    form = weight.factored()
    is_plain = isinstance(weight, LoraWeight) and not is_weight(weight.w)
    limit = _smaller_side(form)
    if is_plain and weight.rank <= min(limit, rank or limit):
        return weight, zeros((), float)
    folded = fold(form)
    if folded is None:
        if rank is None:
            raise ValueError(_explain_full_rank(place, weight, limit))
        new, error = _approximate(form, min(rank, limit), place.dotted)
        return LoraWeight.from_factored(new), error
    if folded.rank == 0:
        folded = _with_a_rank(folded)
    if folded.rank <= min(limit, rank or limit):
        return LoraWeight.from_factored(folded), zeros((), float)
    new, error = compress(folded, min(limit, rank or limit))
    return LoraWeight.from_factored(new), error


def _smaller_side(form: Factored) -> int:
    b, a = jax.eval_shape(as_matrices, form)
    return min(b.shape[-2], a.shape[-1])


def _explain_full_rank(place: Place, weight: AbstractLoraWeight, limit: int) -> str:
    method = getattr(weight, "method", type(weight).__name__)
    return (
        f"{place.dotted} is of the method {method!r}, which scales its base too: its "
        "update has full rank, and no LoRA of a smaller one is equal to it. Pass a "
        f"`rank` for the best approximation there is; `rank={limit}`, the smaller side "
        "here, is exact."
    )


def _with_a_rank(form: Factored) -> Factored:
    """`form`, of rank 0, with a component of zeros: there is no LoRA of rank 0."""
    axis = form.a.ndim - 1 - len(form.columns)
    a_shape = (*form.a.shape[:axis], 1, *form.a.shape[axis + 1 :])
    return form.replace(
        b=jnp.zeros((*form.b.shape[:-1], 1), form.b.dtype),
        a=jnp.zeros(a_shape, form.a.dtype),
    )


def _approximate(form: Factored, rank: int, path: str) -> tuple[Factored, Array]:
    """The best approximation of a form that has a gain, and its relative error."""
    parts = [_decompose(layer, rank) for _, layer in split_layers(form, path)]
    b, a, lost, sizes = (jnp.stack(arrays) for arrays in zip(*parts))
    new = bare(form)
    batch = new.a.shape[: new.a.ndim - 1 - len(new.columns)]
    b, a = (array.reshape(*batch, *array.shape[1:]) for array in (b, a))
    return with_matrices(new, b, a), relative_error(lost, sizes)


@functools.partial(jax.jit, static_argnums=1)
def _decompose(form: Factored, rank: int) -> tuple[Array, Array, Array, Array]:
    u, sizes, v = jnp.linalg.svd(dense_update(form), full_matrices=False)
    return *split(u, sizes, v, rank), sizes[rank:], sizes
