"""Specs: for each parameter of a tree, whether it is frozen, trained or adapted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast, TypeAlias

import jax
import numpy as np

from .._factored import stands_for_array
from .._shared import axes_from_end, Placement, PyTree
from .places import flatten_one_level


LORA_FREEZE = 0
"""The parameter is not trained."""

LORA_FULL = -1
"""The parameter is trained whole."""


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """How one parameter is adapted, where a rank is not enough: in the spec of
    `lorax.init_lora`, and as `rank` of `lorax.loraify`.

    !!! example

        A kernel `(model, heads, size)` that is used in an `einsum` has one axis on one
        side and two on the other:

        ```python
        spec = lorax.LoraSpec(8, rows=(0,), columns=(1, 2))
        ```

    **Arguments:**

    - `rank`: The rank of the update.
    - `rows`: The axes that the factor `b` owns.
    - `columns`: The axes that the factor `a` owns.
    - `batch`: The axes with an adapter for each index, such as the layers of a stack.
        Of `rows` and `columns`, one may be left out: it then has all other axes. If
        both are, `columns` is the last axis. In `lorax.loraify`, if `batch` is left out
        too, the axes are those of the layer.
    - `alpha`: The numerator of the scale. Defaults to the argument of
        `lorax.init_lora` or `lorax.loraify`.
    - `rank_stabilised`: Whether the scale is `alpha / sqrt(rank)`.
    - `sharding`: The sharding of the factors, see `lorax.loraify`. Defaults to the
        argument of `lorax.init_lora` or `lorax.loraify`.
    """

    rank: int
    rows: Sequence[int] | None = None
    columns: Sequence[int] | None = None
    batch: Sequence[int] = ()
    alpha: int | float | None = None
    rank_stabilised: bool = False
    sharding: Placement = None

    def axes(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The row and the column axes of an array of `ndim` axes, counted from the
        end. Raises `ValueError` if an axis does not exist or is named twice."""

        def from_the_end(axes: Sequence[int]) -> tuple[int, ...]:
            if not all(-ndim <= axis < ndim for axis in axes):
                raise ValueError(f"{self} names an axis that {ndim} axes have not.")
            return tuple(axis - ndim if axis >= 0 else axis for axis in axes)

        batch = from_the_end(self.batch)
        rows, columns = self.rows, self.columns
        if rows is None and columns is None:
            columns = (-1,)
        named = {*batch, *from_the_end(rows or ()), *from_the_end(columns or ())}
        others = tuple(axis for axis in axes_from_end(ndim) if axis not in named)
        rows = others if rows is None else from_the_end(rows)
        columns = others if columns is None else from_the_end(columns)
        if sorted((*batch, *rows, *columns)) != [*axes_from_end(ndim)]:
            raise ValueError(
                f"{self} must name each of the {ndim} axes once, among `rows`, "
                "`columns` and `batch`."
            )
        if not rows or not columns:
            raise ValueError(f"{self} leaves no axes for the rows or the columns.")
        return rows, columns


SpecValue: TypeAlias = int | LoraSpec
"""What happens to one parameter: a rank, a `lorax.LoraSpec`, `lorax.LORA_FREEZE` or
`lorax.LORA_FULL`."""

DecisionFn: TypeAlias = Callable[["KeyPath", Any], SpecValue]
"""From the `lorax.KeyPath` of an array, and the array, to what happens to it."""


class KeyPath(tuple[Any, ...]):
    """The path of a parameter: the tuple of JAX's keys. `"name" in path` asks for a
    component of that name, and `str(path)` is `"these/names"`.

    !!! example

        ```python
        def decide(path, array):
            return 4 if "dense" in path else lorax.LORA_FREEZE
        ```
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The components of the path as strings."""
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in self)

    def __contains__(self, item: object) -> bool:
        return item in self.names or tuple.__contains__(self, item)

    def __str__(self) -> str:
        return "/".join(self.names)


def simple_spec(
    params: PyTree,
    decision_fn: DecisionFn | None = None,
    tune_vectors: bool = False,
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree[SpecValue]:
    """A spec for every parameter of a tree, for `lorax.init_lora`.

    !!! example

        ```python
        def decide(path, array):
            return 8 if "kernel" in path else lorax.LORA_FREEZE

        spec = lorax.simple_spec(params, decide, tune_vectors=True)
        ```

    **Arguments:**

    - `params`: A pytree of arrays.
    - `decision_fn`: A function that is called with the path and the array, for each
        array of two axes or more, and returns a rank, a `lorax.LoraSpec`,
        `lorax.LORA_FREEZE` or `lorax.LORA_FULL`. The path is a `lorax.KeyPath`. Without
        the function everything is frozen.
    - `tune_vectors`: Whether arrays of fewer axes are trained instead of frozen.
    - `is_leaf`: See `jax.tree.map`.

    **Returns:**

    A pytree of the structure of `params`.
    """

    def decide(path: Any, x: Any) -> SpecValue:
        if np.ndim(x) < 2:
            return LORA_FULL if tune_vectors else LORA_FREEZE
        return LORA_FREEZE if decision_fn is None else decision_fn(KeyPath(path), x)

    return jax.tree_util.tree_map_with_path(
        decide,
        params,
        is_leaf=lambda x: stands_for_array(x) or (is_leaf is not None and is_leaf(x)),
    )


def map_spec(
    fn: Callable[[str, Any, SpecValue], Any],
    params: PyTree,
    spec: PyTree[SpecValue],
    is_leaf: Callable[[Any], bool] | None = None,
) -> PyTree:
    """`params` with `fn(path, parameter, its spec)` in the place of each parameter: an
    array or a weight. `spec` may be a prefix: its value for a node holds for everything
    beneath that.

    Raises `ValueError` if `spec` does not fit, or has something else at its leaves.
    """

    def visit(path: tuple[str, ...], node: Any, spec: Any) -> Any:
        ends = stands_for_array(node) or is_leaf is not None and is_leaf(node)
        level = None if ends or node is None else flatten_one_level(node)
        if node is None:
            return None
        is_value = isinstance(spec, int | np.integer | LoraSpec)
        if level is None:
            if not is_value or isinstance(spec, bool):
                raise ValueError(
                    f"`spec` has {spec!r} at {_dotted(path)}, where the parameters "
                    "have an array. Give a rank, a `lorax.LoraSpec`, "
                    "`lorax.LORA_FREEZE` or `lorax.LORA_FULL`."
                )
            return fn(_dotted(path), node, cast(SpecValue, spec))
        named, treedef = level
        names = [name for name, _ in named]
        below = [spec] * len(named) if is_value else _children(path, names, spec)
        return treedef.unflatten(
            [
                visit((*path, name), child, child_spec)
                for (name, child), child_spec in zip(named, below)
            ]
        )

    return visit((), params, spec)


def _children(path: tuple[str, ...], names: list[str], spec: Any) -> list[Any]:
    level = None if spec is None else flatten_one_level(spec)
    if level is None:
        raise ValueError(
            f"`spec` has {spec!r} at {_dotted(path)}, where the parameters go on with "
            f"{', '.join(names)}."
        )
    found = dict(level[0])
    missing = [name for name in names if name not in found]
    extra = [name for name in found if name not in names]
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has also {', '.join(extra)}"] if extra else []
        raise ValueError(
            f"`spec` does not fit the parameters: at {_dotted(path)} it "
            f"{' and '.join(parts)}. `lorax.simple_spec(params, decision_fn)` makes "
            "one that fits."
        )
    return [found[name] for name in names]


def _dotted(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the root"
