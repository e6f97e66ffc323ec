"""The module door: putting adapters into a model, and taking them out again."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from ._fresh import adapted, axes_of
from ._init import check_key, Init, key_for
from ._layer import is_layer
from ._layers import layer_for
from ._merging import merged
from ._select import Filter, Pattern
from ._sharding import Placement
from ._targets import find_targets, per_target, summarised, Target
from ._tree import Place, Places, rebuild
from ._weight import base_of, is_weight


_Model = TypeVar("_Model")
_Value = TypeVar("_Value")
PerTarget: TypeAlias = _Value | Mapping[Pattern, _Value]

_DEFAULT_RANK = 8


def loraify(
    model: _Model,
    filter: Filter = None,
    *,
    rank: PerTarget[int] = _DEFAULT_RANK,
    alpha: PerTarget[int | float | None] = None,
    dropout: PerTarget[int | float] = 0.0,
    init: Init = "uniform",
    dtype: DTypeLike | None = None,
    rank_stabilised: bool = False,
    nested: bool = False,
    sharding: PerTarget[Placement] = None,
    key: PRNGKeyArray,
) -> _Model:
    """Puts low-rank adapters into a model.

    Each adapted layer keeps its module inside, with its weight `w` replaced by
    `w + scale * (b · a)`. The base arrays are not copied. A fresh adapter adds exactly
    zero, as `b` starts at zero.

    !!! example

        ```python
        model = lorax.loraify(model, ["query", "value"], rank=8, key=key)
        ```

    **Arguments:**

    - `model`: Any pytree with Equinox modules in it.
    - `filter`: What to adapt.
        - `None`: every `equinox.nn.Linear` and convolution.
        - A path pattern or a list of them. `"query"` names whatever is called that,
            anywhere; `"blocks.*.attention.query"` is matched name by name from the root
            (`**` for any number of names); a compiled regular expression must match
            the full path. Naming a container selects the layers beneath it; naming an
            array of any other module, such as `"cell.weight_hh"`, adapts that array.
        - A predicate, called on every module in the model, or a type.
        - A filter spec: a pytree prefix of the model with bools or predicates at its
            leaves.
    - `rank`: The rank of the updates, from 1 to the smaller side of the weight. For
        this, `alpha` and `dropout` a mapping from patterns to values gives each target
        the value of the first pattern that matches it or a container around it, and
        the default where none does.
    - `alpha`: The numerator of `scale = alpha / rank`. Defaults to the rank, so that
        the scale is 1.
    - `dropout`: The probability with which inputs of the low-rank branch are dropped in
        linear layers and convolutions. That takes keys: see `lorax.dropout_key`.
    - `init`: How `a` starts: `"uniform"`, that is `U(±1 / sqrt(fan_in))`;
        `"gaussian"`, that is `N(0, 1 / rank²)`; or a function
        `(key, shape, dtype) -> array` as in `jax.nn.initializers`. For embeddings both
        names mean `N(0, 1)`.
    - `dtype`: The dtype of the factors. Defaults to that of the weight, or to float32
        if that is wider.
    - `rank_stabilised`: Whether to use `scale = alpha / sqrt(rank)`.
    - `nested`: Whether a target that already has an adapter gets another on top, with
        the one there frozen. Otherwise that is an error.
    - `sharding`: Where the factors lie, or a mapping from patterns. By default they
        follow the base, which is never moved: `b` is sharded as the rows are and `a` as
        the columns, and the rank is replicated. Otherwise a `jax.sharding.Sharding`; a
        `jax.sharding.PartitionSpec` on the base's mesh, such as `PartitionSpec()` for
        replicated factors; or a pair of these for `b` and `a`, `None` for what follows.
        Every device makes its own part. `init` is then compiled, and has to allow it.
    - `key`: A `jax.random.key`. The factors of a target depend on it and on the
        target's path alone.

    **Returns:**

    The adapted model. `model` itself is not changed.

    **Raises:**

    `ValueError` or `TypeError`, before anything is done, if any part of `filter` or of
    a mapping matches nothing, and if an option is out of range for any target.

    ??? cite

        [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685)
    """
    check_key(key)
    _check_init(init)
    places = Places(model)
    targets = find_targets(model, places, filter)
    before = [target for target in targets if target.is_adapted]
    if before and not nested:
        raise ValueError(
            f"`model` already has adapters at {summarised(before)}. Pass `nested=True` "
            "to put second ones on top of them, take them out with `lorax.unloraify`, "
            "or leave them out of `filter`."
        )
    ranks = per_target(rank, targets, "rank", _DEFAULT_RANK)
    alphas = per_target(alpha, targets, "alpha", None)
    dropouts = per_target(dropout, targets, "dropout", 0.0)
    shardings = per_target(sharding, targets, "sharding", None)
    _check_ranks(targets, ranks)
    _check_alphas(targets, alphas)
    _check_dropouts(targets, dropouts)

    key_paths = _key_paths(targets)
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {}
    options = zip(targets, ranks, alphas, dropouts, shardings)
    for target, rank_, alpha_, rate, placement in options:
        for array in target.arrays:
            weight = adapted(
                target,
                array,
                rank=rank_,
                alpha=float(rank_ if alpha_ is None else alpha_),
                init=init,
                dtype=dtype,
                rank_stabilised=rank_stabilised,
                sharding=placement,
                key=key_for(key, key_paths[array]),
            )
            edits[array.steps] = lambda _, weight=weight: weight
        edits[target.module.steps] = wrapping(target.module, rate)
    return rebuild(model, edits)


def unloraify(model: _Model, *, merge: bool = True, donate: bool = False) -> _Model:
    """Takes the adapters out of a model: the tree structure, types and dtypes are again
    those that it had before `lorax.loraify`.

    **Arguments:**

    - `model`: A model with adapters.
    - `merge`: Whether the updates are added to the base weights, in float32 or wider
        and rounded once. With `merge=False` they are dropped, and the very base arrays
        come back.
    - `donate`: Whether each merged weight is written over its base, so that no second
        copy of the weights is needed. The base arrays of `model`, but those that are
        also elsewhere in it, can then no longer be used.

    **Returns:**

    The model without adapters, every weight where its base lies: nothing is gathered.
    `model` itself is not changed, but for what is donated.

    **Raises:**

    `ValueError` if there is no adapter, or if any merged weight is not finite, and then
    nothing was changed; inside `jax.jit` that is found out at run time.
    """
    places = Places(model)
    weights = [place for place in places.all if is_weight(place.node)]
    layers = [place for place in places.all if is_layer(place.node)]
    if not weights and not layers:
        raise ValueError(
            "`model` has no adapters to take out. Was it passed through "
            "`lorax.loraify`, and has it been merged before?"
        )
    if donate and not merge:
        raise ValueError(
            "`donate=True` writes merged weights over their bases, and `merge=False` "
            "merges none. Leave out one of them."
        )
    if merge:
        arrays = merged(model, weights, donate=donate)
    else:
        arrays = [base_of(place.node) for place in weights]
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.steps: lambda _, array=array: array
        for place, array in zip(weights, arrays)
    }
    edits |= {place.steps: lambda layer: layer.wrapped for place in layers}
    return rebuild(model, edits)


def wrapping(place: Place, rate: int | float) -> Callable[[Any], Any]:
    """What puts the layer for the module at `place` around it."""
    layer: Any = layer_for(place.module)

    def wrap(node: Any) -> Any:
        module = node.wrapped if is_layer(node) else node
        if not layer.has_dropout:
            return layer(module)
        return layer(module, eqx.nn.Dropout(rate) if rate else None)

    return wrap


def _key_paths(targets: Sequence[Target]) -> dict[Place, str]:
    """The path from which each array's key is derived: its own, or that of the first
    place where the same array is found."""
    first: dict[int, Place] = {}
    paths: dict[Place, str] = {}
    twice: list[str] = []
    for array in (array for target in targets for array in target.arrays):
        origin = first.setdefault(id(base_of(array.node)), array)
        paths[array] = origin.dotted
        if origin is not array:
            twice.append(f"{array.dotted} is also {origin.dotted}")
    if twice:
        warnings.warn(
            f"One array in several places: {', '.join(twice)}. To Equinox these are "
            "separate weights: their adapters start equal and are trained apart, over "
            "one base. If they are meant to be tied, say so with `eqx.nn.Shared`.",
            stacklevel=3,
        )
    return paths


def _check_init(init: Any) -> None:
    if not callable(init) and init not in ("uniform", "gaussian"):
        raise ValueError(
            f"`init={init!r}` is unknown. Pass 'uniform', 'gaussian' or a function "
            "`(key, shape, dtype) -> array` such as `jax.nn.initializers.normal(0.02)`."
        )


def _check_ranks(targets: Sequence[Target], ranks: Sequence[Any]) -> None:
    too_large = {}
    for target, rank in zip(targets, ranks):
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
            raise TypeError(f"`rank={rank!r}` must be an integer.")
        if rank < 1:
            raise ValueError(f"`rank={rank}` must be at least 1.")
        for array in target.arrays:
            shape = array.node.shape
            limit = min(
                math.prod(shape[axis] for axis in axes) for axes in axes_of(array)
            )
            if rank > limit:
                too_large[array.dotted] = (rank, limit, tuple(shape))
    if too_large:
        listed = "; ".join(
            f"`rank={rank}` exceeds the smaller side, {limit}, of {path} {shape}"
            for path, (rank, limit, shape) in list(too_large.items())[:5]
        )
        more = f"; and {len(too_large) - 5} more" if len(too_large) > 5 else ""
        fix: dict[str, Any] = {path: x[1] for path, x in list(too_large.items())[:5]}
        fix["*"] = next(iter(too_large.values()))[0]
        raise ValueError(
            f"{listed}{more}. Give these a rank of their own, `rank={fix}`, or leave "
            "them out of `filter`."
        )


def _check_alphas(targets: Sequence[Target], alphas: Sequence[Any]) -> None:
    for target, alpha in zip(targets, alphas):
        if alpha is None:
            continue
        if not isinstance(alpha, int | float | np.number) or isinstance(alpha, bool):
            raise TypeError(
                f"`alpha={alpha!r}` must be a Python number: it is static, not trained."
            )
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(
                f"`alpha={alpha}` for {target.module.dotted} must be positive and "
                "finite; `alpha=None` makes the scale 1."
            )


def _check_dropouts(targets: Sequence[Target], dropouts: Sequence[Any]) -> None:
    for target, rate in zip(targets, dropouts):
        if not isinstance(rate, int | float | np.number) or not 0 <= rate < 1:
            raise ValueError(
                f"`dropout={rate!r}` must be a probability from 0 to below 1."
            )
        if rate and not layer_for(target.module.module).has_dropout:
            raise ValueError(
                f"`dropout={rate}` cannot be applied in {target.module.dotted}, a "
                f"{type(target.module.module).__name__}: only linear layers and "
                "convolutions have it. Give the others alone a rate: "
                "`dropout={'<pattern>': ...}`."
            )
