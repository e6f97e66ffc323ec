"""The summary of an adapted model: what is trained, and the memory that takes."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from .._factored import is_factored
from .._methods import (
    base_of,
    check_whole,
    is_missing,
    is_packed,
    is_weight,
    list_weights,
    LoraWeight,
    unfuse,
)
from .._modules import remove_keys
from .._shared import (
    count_bytes,
    count_device_bytes,
    format_table,
    is_array,
    is_inexact,
    list_arrays,
    name_group,
    plan_optimizer_state,
    PyTree,
    star_numbers,
)
from .._trees import Filter, Place, Places
from .train import mark_factors, trainable


@dataclasses.dataclass(frozen=True)
class TargetSummary:
    """One adapted weight, or one array that is trained as it is."""

    path: str
    """Where it is in the model."""
    kind: str
    """The type of the module that holds it."""
    shape: tuple[int, ...]
    """That of the base."""
    dtype: str
    """That of the base."""
    method: str | None
    """The name of the method, or `None` for an array that is trained as it is."""
    rank: int | None
    """The rank of the update, or `None`."""
    scale: float | None
    """What multiplies the update, or `None`."""
    trained: int
    """The number of trained elements, which are those of the factors."""
    frozen: int
    """The number of elements of the base."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `lorax.summary` found. Its `str` is a table."""

    targets: tuple[TargetSummary, ...]
    """The adapted weights."""
    also: tuple[TargetSummary, ...]
    """The arrays that are trained as they are."""
    trained: int
    """The number of all trained elements."""
    trained_bytes: int
    """Their bytes."""
    frozen: int
    """The number of all other elements."""
    frozen_bytes: int
    """Their bytes."""
    adam_bytes: int
    """The bytes of Adam's state for what is trained."""
    full_adam_bytes: int
    """The bytes of Adam's state for training the base model as a whole."""
    device_trained_bytes: int
    """The trained bytes on one device, which may have parts of arrays."""
    device_frozen_bytes: int
    """The other bytes on one device."""
    device_adam_bytes: int
    """The bytes of Adam's state on one device: each moment has the sharding of its
    parameter."""

    def __str__(self) -> str:
        return self.table()

    def table(self, *, full: bool = False) -> str:
        """The table as a string.

        **Arguments:**

        - `full`: Whether each target has a line of its own. Otherwise targets whose
            paths differ only in numbers, and that agree in all columns, are one line,
            `blocks.*.query.weight × 12`, with the sums of their elements.
        """
        each = [(x.path, [x]) for x in (*self.targets, *self.also)]
        rows = _format_rows(each if full else self._groups())
        share = self.trained / max(self.trained + self.frozen, 1)
        # It is not known for an adapter without its base.
        of_all = format_bytes(self.full_adam_bytes) if self.full_adam_bytes else "?"
        trained = self._sizes(self.trained_bytes, self.device_trained_bytes)
        frozen = self._sizes(self.frozen_bytes, self.device_frozen_bytes)
        adam = self._sizes(self.adam_bytes, self.device_adam_bytes)
        lines = [
            f"trained     {self.trained:>15,}  {trained}  ({share:.2%} of all)",
            f"frozen      {self.frozen:>15,}  {frozen}",
            f"Adam state  {'':>15}  {adam}  ({of_all} for full fine-tuning)",
        ]
        columns, rows = _drop_method(rows)
        return "\n".join([format_table(columns, _RIGHT, rows), *lines])

    def _groups(self) -> list[tuple[str, list[TargetSummary]]]:
        """For each line of the table its name and its targets."""
        alike: dict[Any, list[TargetSummary]] = {}
        for target in (*self.targets, *self.also):
            line = dataclasses.replace(target, path=star_numbers(target.path))
            alike.setdefault(line, []).append(target)
        count = collections.Counter(line.path for line in alike)
        return [
            (name_group([x.path for x in group], count[line.path] == 1), group)
            for line, group in alike.items()
        ]

    def _sizes(self, all_bytes: int, device_bytes: int) -> str:
        size = f"{format_bytes(all_bytes):>8}"
        whole = self.trained_bytes + self.frozen_bytes
        if self.device_trained_bytes + self.device_frozen_bytes == whole:
            return size
        return f"{size}  {format_bytes(device_bytes):>8} on each device"


_COLUMNS = (
    *("target", "module", "shape", "dtype", "method"),
    *("rank", "scale", "trained", "frozen"),
)
_RIGHT = ("rank", "scale", "trained", "frozen")


def summary(model: PyTree, also: Filter = None, *, exclude: Filter = None) -> Summary:
    """Summarises a model: what is adapted, how much is trained, and the memory.

    !!! example

        ```python
        print(lorax.summary(model))
        ```

    **Arguments:**

    - `model`: Any model, or the `params` of `lorax.partition`, which know only the
        shapes of their bases. The arrays may be abstract (`equinox.filter_eval_shape`).
        If they are sharded, or abstract with a `sharding`, the memory on each device is
        known too.
    - `also`: What is trained besides the adapters, see `lorax.trainable`. Each such
        array has a line at the end.
    - `exclude`: What is not trained after all, see `lorax.trainable`.

    **Returns:**

    A `lorax.Summary`. As a string it is a table, in which numbered siblings that agree
    are one line. `summary.table(full=True)` has a line for each.

    **Raises:**

    `ValueError` if any part of `also` or `exclude` names nothing.
    """
    check_whole(model, "lorax.summary({})", or_params=True)
    model = remove_keys(model)
    is_plain = also is None and exclude is None
    spec = mark_factors(model) if is_plain else trainable(model, also, exclude=exclude)
    params, frozen = eqx.partition(model, spec)
    trained = {place.indices: place.node for place in Places(params).all}
    places = Places(model).all
    base = jax.tree.map(base_of, model, is_leaf=is_weight)
    is_alone = any(base_of(x) is None for x in list_weights(model))
    adam = _plan_adam(params)
    return Summary(
        targets=tuple(
            _summarise_weight(place, trained[place.indices])
            for place in places
            if _is_target(place.node)
        ),
        also=tuple(
            _summarise_array(place)
            for place in places
            if is_array(place.node) and is_array(trained.get(place.indices))
        ),
        trained=_count_elements(params),
        trained_bytes=count_bytes(params),
        frozen=_count_elements(frozen),
        frozen_bytes=count_bytes(frozen),
        adam_bytes=count_bytes(adam),
        full_adam_bytes=0
        if is_alone
        else count_bytes(_plan_adam(eqx.filter(_drop_bits(base), is_inexact))),
        device_trained_bytes=count_device_bytes(params),
        device_frozen_bytes=count_device_bytes(frozen),
        device_adam_bytes=count_device_bytes(adam),
    )


def _is_target(node: Any) -> bool:
    # A weight that was excluded has no arrays in the `params`.
    return is_weight(node) and bool(jax.tree.leaves(node))


def _summarise_weight(place: Place, params: Any) -> TargetSummary:
    weight = unfuse(place.node)
    is_known = not is_missing(weight.w)
    rank, scale = getattr(weight, "rank", None), getattr(weight, "scale", None)
    if rank is None:
        # The rank of a method may be another one than that of its normal form.
        form = weight.factored()
        rank, scale = form.rank, form.scale
    shape = ()
    if is_known:
        shape = tuple(weight.shape)
    elif isinstance(weight, LoraWeight):
        shape = weight.shape_by_factors()
    return TargetSummary(
        path=place.dotted,
        kind=_name_module(place),
        shape=shape,
        dtype=jnp.dtype(weight.dtype).name if is_known else "",
        method=getattr(weight, "method", LoraWeight.method),
        rank=rank,
        scale=scale,
        trained=_count_elements(params),
        frozen=_count_elements(base_of(weight)),
    )


def _summarise_array(place: Place) -> TargetSummary:
    array = place.node
    return TargetSummary(
        path=place.dotted,
        kind=_name_module(place),
        shape=tuple(array.shape),
        dtype=jnp.dtype(array.dtype).name,
        method=None,
        rank=None,
        scale=None,
        trained=_count_elements(array),
        frozen=0,
    )


def _name_module(place: Place) -> str:
    return type(place.owner.module).__name__ if place.owner else ""


def _count_elements(tree: PyTree) -> int:
    """The number of elements, which for a quantised array is what it stands for."""
    return sum(math.prod(x.shape) for x in list_arrays(_drop_bits(tree)))


def _drop_bits(tree: PyTree) -> PyTree:
    """The tree with what a quantised array stands for, abstract, in its place."""

    def is_bits(x: Any) -> bool:
        return is_packed(x) and not is_factored(x) and not is_missing(x)

    def drop(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_bits(x) else x

    return jax.tree.map(drop, tree, is_leaf=is_bits)


def _plan_adam(params: PyTree) -> PyTree:
    return plan_optimizer_state(optax.adam(1e-3), params)


def format_bytes(count: int | float) -> str:
    """The number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _format_rows(
    groups: list[tuple[str, list[TargetSummary]]],
) -> list[tuple[str, ...]]:
    return [
        (
            name,
            group[0].kind,
            "×".join(map(str, group[0].shape)),
            group[0].dtype,
            group[0].method or "",
            "" if group[0].rank is None else str(group[0].rank),
            "" if group[0].scale is None else f"{group[0].scale:g}",
            f"{sum(target.trained for target in group):,}",
            f"{sum(target.frozen for target in group):,}",
        )
        for name, group in groups
    ]


def _drop_method(rows: list[tuple[str, ...]]) -> tuple[Sequence[str], list[Any]]:
    """The columns and rows without the method, if it is plain LoRA everywhere."""
    at = _COLUMNS.index("method")
    if not {row[at] for row in rows} <= {LoraWeight.method, ""}:
        return _COLUMNS, rows
    columns, *left = ((*x[:at], *x[at + 1 :]) for x in (_COLUMNS, *rows))
    return columns, left
