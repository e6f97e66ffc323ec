"""An adapter apart from its model: taken out of a model, and put into one."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._layers import is_layer
from .._methods import (
    AbstractLoraWeight,
    base_of,
    find_method,
    is_missing,
    is_weight,
)
from .._modules import find_target, join_targets, make_wrapper, Target
from .._shared import (
    inherit_sharding,
    is_array,
    known_sharding,
    list_some,
    place_array,
    replicate,
)
from .._training import find_trained_places
from .._trees import Filter, Place, Places, rebuild
from .fingerprint import fingerprint


_Model = TypeVar("_Model")
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DetachedWeight:
    """An adapted weight without its base, as files have it."""

    path: Path
    method: str
    """The `method` of its class."""
    shape: tuple[int, ...]
    """The shape of the base."""
    dtype: str
    """The dtype of the base."""
    settings: dict[str, Any]
    """The static arguments of the class."""
    dropout: float | None
    """The rate of dropout of its layer; `None` if the layer can have none."""
    arrays: dict[str, Any]
    """The other arguments of the class, without the base."""

    @property
    def dotted(self) -> str:
        """The path as it is written in messages."""
        return ".".join(self.path)

    def attach(self, node: Any) -> AbstractLoraWeight:
        """The weight for the place of `node`, a base or another weight. Its arrays get
        the sharding of the arrays that they replace. Where they replace none, they
        inherit the sharding of the base."""
        replaced = node if is_weight(node) and node.method == self.method else None
        # If `node` is an adapter of an adapted weight, the inner one stays.
        base = node.w if is_weight(node) else node
        weight = self.build(base)
        axes, of_base = weight.array_axes(), known_sharding(base_of(base))

        def place(name: str) -> Any:
            if replaced is not None:
                sharding = known_sharding(getattr(replaced, name))
            else:
                sharding = inherit_sharding(of_base, weight.w.ndim, axes[name])
            return place_array(getattr(weight, name), sharding)

        return eqx.tree_at(
            lambda weight: [getattr(weight, name) for name in self.arrays],
            weight,
            [place(name) for name in self.arrays],
        )

    def build(self, base: Any) -> AbstractLoraWeight:
        """The weight on top of a base. Its arrays stay where they are.

        **Raises:**

        `ValueError` if the class has other arguments, or if it refuses these. Whatever
        else the class raises passes through, since that is its bug and no fault of the
        arguments.
        """
        settings = {
            # Static fields have to be hashable.
            name: tuple(x) if isinstance(x, list) else x
            for name, x in self.settings.items()
        }
        weight_type = find_method(self.method)
        try:
            signature = inspect.signature(weight_type)
            arguments = signature.bind(base, **self.arrays, **settings)
        except TypeError as error:
            raise ValueError(
                f"{self.dotted}: these are not the arguments of a "
                f"{weight_type.__name__}: {error}"
            ) from error
        try:
            return weight_type(*arguments.args, **arguments.kwargs)
        except Exception as error:
            error.add_note(
                f"Raised as a {weight_type.__name__} was made for {self.dotted}."
            )
            raise


@dataclasses.dataclass(frozen=True)
class Adapter:
    """All that is trained of a model, without the rest of it."""

    weights: list[DetachedWeight]
    others: dict[Path, Any]
    """Arrays that are trained as they are: heads, biases."""


def extract_adapter(model: Any, places: Places, also: Filter) -> Adapter:
    """The adapter of a model.

    **Arguments:**

    - `model`: A model without views, see `without_views`.
    - `places`: Its places.
    - `also`: What is trained besides the factors, see `lorax.partition`.

    **Raises:**

    `ValueError` if the model has no adapters or no base, or if `also` names nothing.
    `TypeError` if an array is abstract, or if a weight cannot be made again of the
    arguments of its class.
    """
    weights = [place for place in places.all if is_weight(place.node)]
    if not weights and also is None:
        raise ValueError(
            "`model` has no adapters to save. Call `lorax.loraify` first, or name with "
            "`also` what else was trained."
        )
    others = {
        place.path: replicate(place.node)
        for place in find_trained_places(model, places, also)
    }
    adapter = Adapter([_extract_weight(place) for place in weights], others)
    abstract = [
        ".".join(path)
        for path, array in [
            *others.items(),
            *((x.path, array) for x in adapter.weights for array in x.arrays.values()),
        ]
        if isinstance(array, jax.ShapeDtypeStruct)
    ]
    if abstract:
        raise TypeError(f"There is no array to save at {', '.join(abstract[:8])}.")
    return adapter


def _extract_weight(place: Place) -> DetachedWeight:
    weight = place.node
    if is_missing(weight.w):
        raise ValueError(
            f"{place.dotted} has no base, by which a file knows what it belongs to. "
            "Pass the whole model, `lorax.combine(params, frozen)`."
        )
    method = vars(type(weight)).get("method")
    if method is None:
        raise TypeError(
            f"{place.dotted} is a {type(weight).__name__}, which has no `method` to be "
            "saved by."
        )
    names = [name for name in inspect.signature(type(weight)).parameters if name != "w"]
    for name in names:
        if not hasattr(weight, name):
            raise TypeError(
                f"There is a {type(weight).__name__} at {place.dotted}, whose argument "
                f"`{name}` cannot be saved: it has no field of that name."
            )
    values = {name: getattr(weight, name) for name in names}
    detached = DetachedWeight(
        path=place.path,
        method=method,
        shape=tuple(weight.shape),
        dtype=jnp.dtype(weight.dtype).name,
        settings={name: x for name, x in values.items() if not is_array(x)},
        dropout=_find_dropout(place),
        arrays={name: x for name, x in values.items() if is_array(x)},
    )
    _check_nothing_is_lost(detached, weight)
    arrays = {name: replicate(x) for name, x in detached.arrays.items()}
    return dataclasses.replace(detached, arrays=arrays)


def _check_nothing_is_lost(
    detached: DetachedWeight, weight: AbstractLoraWeight
) -> None:
    """Checks that loading would make the same weight again.

    **Raises:**

    `TypeError` if it would not.
    """
    kind = type(weight).__name__
    unsaved = [
        name for name, setting in detached.settings.items() if not is_setting(setting)
    ]
    if not unsaved:
        loaded = detached.build(weight.w)
        unsaved = [
            field.name
            for field in dataclasses.fields(weight)
            if not _is_same(getattr(weight, field.name), getattr(loaded, field.name))
        ]
    if unsaved:
        raise TypeError(
            f"There is a {kind} at {detached.dotted} that holds in "
            f"{', '.join(f'`{name}`' for name in unsaved)} what would be lost in a "
            "file, which has the arguments of its class: arrays, numbers, strings and "
            "tuples of them. Let an argument say it."
        )


def is_setting(x: Any) -> bool:
    """Whether a file can have `x` as a static argument of a weight."""
    flat = x if isinstance(x, list | tuple) else [x]
    return all(y is None or isinstance(y, bool | int | float | str) for y in flat)


def _is_same(x: Any, y: Any) -> bool:
    if jax.tree.structure(x) != jax.tree.structure(y):
        return False
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y))
    return all(
        one is other
        or (
            fingerprint(one) == fingerprint(other)
            if isinstance(one, jax.Array | np.ndarray) and is_array(other)
            else type(one) is type(other) and one == other
        )
        for one, other in pairs
    )


def _find_dropout(place: Place) -> float | None:
    layer: Any = place.owner.node if place.owner is not None else None
    if not is_layer(layer) or not layer.has_dropout:
        return None
    return float(layer.dropout.p) if layer.dropout is not None else 0.0


def insert_adapter(model: _Model, places: Places, adapter: Adapter) -> _Model:
    """The model with `adapter`, which replaces the adapter that it has, if any.

    **Arguments:**

    - `model`: A model without views, see `without_views`.
    - `places`: Its places.

    **Raises:**

    `ValueError` if the adapter does not fit, with all problems at once: targets that
    only one of the two has, other shapes, other dtypes. Or if a class of weights
    refuses what the adapter has for it.
    """
    by_path = {place.path: place for place in places.all}
    has_adapters = any(is_weight(place.node) for place in places.all)
    wrong = list(_find_misfits(by_path, adapter, has_adapters))
    if wrong:
        lines = list_some(wrong, 12, separator="\n  ")
        raise ValueError(f"The adapter does not fit `model`:\n  {lines}")
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {}
    plain: list[Target] = []
    rates: dict[Place, float] = {}
    for detached in adapter.weights:
        place = by_path[detached.path]
        weight = detached.attach(place.node)
        edits[place.indices] = lambda _, weight=weight: weight
        target = find_target(place)
        if target is not None and not is_weight(place.node):
            plain.append(target)
            rates[target.place] = rates.get(target.place) or detached.dropout or 0.0
    for target in join_targets(plain):
        edits[target.place.indices] = make_wrapper(target, rates[target.place])
    for path, array in adapter.others.items():
        edits[by_path[path].indices] = lambda old, new=array: place_array(
            new, known_sharding(old)
        )
    return rebuild(model, edits)


def _find_misfits(
    by_path: Mapping[Path, Place], adapter: Adapter, has_adapters: bool
) -> Iterator[str]:
    paths = {detached.path for detached in adapter.weights}
    for detached in adapter.weights:
        place = by_path.get(detached.path)
        if place is None or not place.is_array:
            yield f"{detached.dotted}: there is no such array in the model"
        elif (found := tuple(place.node.shape)) != detached.shape:
            yield f"{detached.dotted}: {found} in the model, not {detached.shape}"
        elif has_adapters and not is_weight(place.node):
            yield f"{detached.dotted}: the model has other adapters, but none here"
        elif is_weight(place.node):
            now = {name: getattr(place.node, name, None) for name in detached.arrays}
            for name, array in detached.arrays.items():
                yield from _find_mismatch(
                    f"{detached.dotted}, `{name}`", now[name], array
                )
    for path, place in by_path.items():
        if is_weight(place.node) and path not in paths:
            yield f"{place.dotted}: the adapter has nothing for this one"
    for path, array in adapter.others.items():
        place = by_path.get(path)
        if place is None or not is_array(place.node):
            yield f"{'.'.join(path)}: there is no such array in the model"
        else:
            yield from _find_mismatch(place.dotted, place.node, array)


def _find_mismatch(name: str, now: Any, new: Any) -> Iterator[str]:
    found, wanted = (
        f"{jnp.dtype(x.dtype).name} {tuple(x.shape)}" if is_array(x) else "nothing"
        for x in (now, new)
    )
    if found != wanted:
        yield f"{name}: {found} in the model, {wanted} in the adapter"
