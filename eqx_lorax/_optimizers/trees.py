"""Finding adapters in the trees that optimizers get: parameters, gradients, updates."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._layers import find_layer, is_layer
from .._methods import (
    AbstractLoraWeight,
    AbstractSidedWeight,
    is_weight,
    list_weights,
    unfuse,
)
from .._shared import accumulation_dtype, explicit_sharding, is_inexact, PyTree, unshard


Side: TypeAlias = Literal["rows", "columns"]


def prepare(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer, whose update takes any keywords."""
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    return optax.with_extra_args_support(optimizer)


def map_weights(
    fn: Callable[..., Any], tree: PyTree, *others: PyTree, is_kind: Callable[[Any], Any]
) -> PyTree:
    """`tree` with `fn(weight, *those of the others)` for each weight of a kind."""
    return jax.tree.map(
        lambda x, *ys: fn(x, *ys) if is_weight(x) and is_kind(x) else x,
        tree,
        *others,
        is_leaf=is_weight,
    )


def list_kind(tree: PyTree, is_kind: Callable[[Any], bool]) -> list[Any]:
    """The weights of a kind in a tree."""
    return [x for x in list_weights(tree) if is_kind(x)]


def replace_kind(
    tree: PyTree, is_kind: Callable[[Any], bool], new: Sequence[Any]
) -> PyTree:
    """`tree` with others in the place of the weights of a kind, in their order."""
    rest = iter(new)
    return map_weights(lambda _: next(rest), tree, is_kind=is_kind)


def map_weights_with_outputs(
    fn: Callable[[AbstractLoraWeight, Side], Any], tree: PyTree
) -> PyTree:
    """`tree` with `fn(weight, outputs)` in the place of each weight. `outputs` says
    which of its sides is the output of its layer.

    The layer around a weight decides. Inside layers the rows are outputs, except in
    tables that are looked up in, whose columns are the features that come out. A weight
    without a layer is a parameter of a function, where the last axis comes out, as in
    jax-lorax and Flax.
    """

    def visit(node: Any, outputs: Side | None) -> Any:
        if is_weight(node):
            return fn(node, outputs or _side_of_last_axis(node))
        layer = type(node) if is_layer(node) else find_layer(node)
        if layer is not None:
            outputs = "columns" if layer.is_lookup else "rows"

        def is_inner(x: Any) -> bool:
            is_known = is_weight(x) or is_layer(x) or find_layer(x) is not None
            return x is not node and is_known

        return jax.tree.map(
            lambda x: visit(x, outputs) if is_inner(x) else x, node, is_leaf=is_inner
        )

    return visit(tree, None)


def list_output_factors(weight: AbstractLoraWeight, outputs: Side) -> list[str]:
    """The fields of `weight` that hold a trained factor of its output side, which
    leads from the rank to the outputs."""
    weight = unfuse(weight)
    axes = {"b": ("rows", "rank"), "a": ("rank", "columns")}
    if isinstance(weight, AbstractSidedWeight):
        axes = weight.axes
    return [
        name
        for name, words in axes.items()
        if ({*words} == {outputs, "rank"} or name == "to_outputs")
        and name not in weight.frozen
        and getattr(weight, name, None) is not None
    ]


def has_arrays(weight: AbstractLoraWeight, *names: str) -> bool:
    """Whether these fields hold arrays. In the trees of optimizers, what is frozen or
    masked is something else."""
    return all(is_inexact(getattr(weight, name, None)) for name in names)


def row_matrices(weight: Any, b: Any) -> Array:
    """A row factor `b` of `weight`, or its gradient, as matrices of shape
    `(*batch, rows, rank)`, in float32 or wider."""
    batch = b.ndim - 1 - len(weight.rows)
    shape = (*b.shape[:batch], math.prod(b.shape[batch:-1]), b.shape[-1])
    return _widen(b).reshape(shape)


def column_matrices(weight: Any, a: Any) -> Array:
    """A column factor `a` of `weight`, or its gradient, as matrices of shape
    `(*batch, rank, columns)`, in float32 or wider."""
    batch = a.ndim - 1 - len(weight.columns)
    shape = (*a.shape[: batch + 1], math.prod(a.shape[batch + 1 :]))
    return _widen(a).reshape(shape)


def _widen(x: Any) -> Array:
    # Reshaping and decompositions take no arrays whose types say that they are sharded.
    return jnp.asarray(unshard(x), accumulation_dtype(x.dtype))


def as_before(x: Array, old: Any) -> Array:
    """`x`, which came from matrices, in the shape, the dtype and the sharding of what
    they were made of."""
    x = x.reshape(old.shape).astype(old.dtype)
    sharding = explicit_sharding(old)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _side_of_last_axis(weight: AbstractLoraWeight) -> Side:
    return "rows" if -1 in getattr(weight, "rows", ()) else "columns"


def no_adapters(what: str, fix: str) -> ValueError:
    """The error for a tree without the adapters that an optimizer is for."""
    return ValueError(
        f"`params` have {what}, so this optimizer has nothing to do. {fix}"
    )


def no_params(name: str) -> ValueError:
    """The error for an update without the parameters."""
    return ValueError(
        f"`lorax.{name}` needs the parameters too. Call "
        "`optimizer.update(grads, state, params)`."
    )
