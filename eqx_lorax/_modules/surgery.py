"""Putting adapters into a model, and taking them out."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from .._layers import is_layer
from .._methods import (
    AbstractLoraWeight,
    assign_options,
    base_of,
    check_key,
    check_whole,
    Init,
    is_weight,
    key_for,
    resolve_init,
)
from .._shared import list_some, Placement, suggest_keywords
from .._trees import Filter, LoraSpec, Place, Places, rebuild
from .form import resolve_forms
from .fresh import make_adapter
from .held import strip_adapters, without_views
from .merging import check_can_requantise, merge_weights
from .options import PerTarget, resolve_per_target
from .quantising import settle_layer
from .targets import find_targets, list_targets, Target


_Model = TypeVar("_Model")


@suggest_keywords(
    r="`rank`",
    rank_pattern="a mapping as `rank`",
    lora_alpha="`alpha`",
    alpha_pattern="a mapping as `alpha`",
    lora_dropout="`dropout`",
    target_modules="`filter`",
    exclude_modules="`exclude`",
    use_rslora="`rank_stabilised`",
    init_lora_weights="`init`",
    modules_to_save="`also` of `lorax.partition`",
)
def loraify(
    model: _Model,
    filter: Filter = None,
    *,
    exclude: Filter = None,
    method: PerTarget[str | type[AbstractLoraWeight]] = "lora",
    rank: PerTarget[int | LoraSpec | None] = None,
    alpha: PerTarget[int | float | None] = None,
    dropout: PerTarget[int | float] = 0.0,
    init: Init = "uniform",
    dtype: DTypeLike | None = None,
    rank_stabilised: bool = False,
    nested: bool = False,
    sharding: PerTarget[Placement] = None,
    key: PRNGKeyArray,
    **options: Any,
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
        - `None`: every `equinox.nn.Linear` and convolution, subclasses included.
        - A path pattern or a list of them. `"query"` names everything with that name,
            anywhere. `"blocks.*.attention.query"` is matched name by name from the
            root, and `**` stands for any number of names. Naming a container selects
            the layers beneath it. Naming an array of any other module, such as
            `"cell.weight_hh"`, adapts that array. A compiled regular expression must
            match the full path of a layer or an array; it does not see containers.
        - A predicate, called on every module in the model, or a type.
        - A filter spec: a pytree prefix of the model with bools or predicates at its
            leaves.
    - `exclude`: A filter for what is not adapted. Everything that it names, and
        everything beneath that, is left out.
    - `method`: The name of a method: `"lora"`, `"dora"`, `"vera"`, `"loha"`, `"lokr"`,
        `"lora_fa"`, `"lora_xs"`, `"adalora"`, `"ia3"`, `"full"`, `"tokens"`,
        `"segments"`, or that of one of your own. Or its class, a subclass of
        `lorax.AbstractLoraWeight`, such as `lorax.DoraWeight`.
    - `rank`: The rank of the updates, from 1 to the smaller side of the weight. By
        default 8, or the smaller side where that is less. A `lorax.LoraSpec` also says
        which axes are rows, columns and batch, and may have its own `alpha`,
        `rank_stabilised` and `sharding`. If it names no axes, they are those of the
        layer. `method`, `rank`, `alpha`, `dropout` and `sharding` may also be mappings
        from patterns to values: a target has the value of the first pattern that
        matches it or a container around it, and the default where none does.
    - `alpha`: The numerator of `scale = alpha / rank`. Defaults to the rank, so that
        the scale is 1. (The default of `lorax.init_lora` is an `alpha` of 1.)
    - `dropout`: The probability with which inputs of the low-rank branch are dropped in
        linear layers and convolutions. Dropout needs keys: see `lorax.dropout_key`.
    - `init`: How `a` starts: `"uniform"` for `U(±1 / sqrt(fan_in))`, `"gaussian"` for
        `N(0, 1 / rank²)`, or a function
        `(key, shape, dtype) -> array` as in `jax.nn.initializers`. For embeddings both
        names mean `N(0, 1)`. For LoRA and DoRA also how both factors start:
        `"orthogonal"`, `"pissa"`, `"olora"`, `"milora"`, or a `lorax.AbstractStart`,
        such as `lorax.Pissa(iterations=4)` or one of a `lorax.Calibration`. A fresh
        adapter adds nothing all the same, and the base stays as it is. The exception is
        `lorax.LoftQ`, which adds what quantising the base has rounded away.
    - `dtype`: The dtype of the factors. Defaults to that of the weight, or to float32
        if that is wider.
    - `rank_stabilised`: Whether to use `scale = alpha / sqrt(rank)`.
    - `nested`: Whether a target that already has an adapter gets another on top, with
        the one there frozen. Otherwise that is an error.
    - `sharding`: The sharding of the factors, or a mapping from patterns. By default
        they follow the base, which is never moved: `b` is sharded as the rows are and
        `a` as the columns are, and the rank is replicated. Otherwise a
        `jax.sharding.Sharding`; a `jax.sharding.PartitionSpec` on the base's mesh, such
        as `PartitionSpec()` for replicated factors; or a pair of these for `b` and `a`,
        where `None` follows the base. Every device makes its own part of the factors,
        by a compiled program, so `init` has to be traceable then.
    - `key`: A `jax.random.key`. The factors of a target depend on the key and on the
        target's path alone.
    - `options`: Those of the method, such as `decompose_factor` of `"lokr"`: the
        keywords of its `create`. Of several methods each has those that it takes.

    **Returns:**

    The adapted model. `model` itself is not changed.

    **Raises:**

    `ValueError` or `TypeError`, before anything is done, if any part of `filter`, of
    `exclude` or of a mapping matches nothing, or if an option is out of range for any
    target. An array of three axes or more that belongs to no known layer is taken for a
    batch of matrices in its last two axes. Where such an adapter would have as many
    elements as the array, the axes have to be given, by a `lorax.LoraSpec`.

    A warning if a layer that nobody named cannot be adapted, because its weight is
    missing or is not an array.

    ??? cite

        [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685)
    """
    _check_model(model)
    check_key(key)
    init = resolve_init(init)
    check_whole(model, "lorax.loraify({}, ...)")
    places = Places(model)
    targets, passed_over = find_targets(model, places, filter, exclude)
    before = [target for target in targets if target.is_adapted]
    if before and not nested:
        raise ValueError(
            f"`model` already has adapters at {list_targets(before)}. Pass "
            "`nested=True` to put second ones on top of them, take them out with "
            "`lorax.unloraify`, or leave them out with `exclude`."
        )
    forms = resolve_forms(
        targets,
        rank=rank,
        alpha=alpha,
        rank_stabilised=rank_stabilised,
        sharding=sharding,
        method=method,
    )
    dropouts = resolve_per_target(dropout, targets, "dropout", 0.0)
    _check_dropouts(targets, dropouts)
    _warn_of_passed_over(passed_over)
    methods = dict.fromkeys(form.method for form in forms.values())
    options_of = assign_options(methods, options, "lorax.loraify", _ARGUMENTS)

    key_paths = _key_paths(targets)
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {}
    for target, rate in zip(targets, dropouts):
        for array in target.arrays:
            key_ = key_for(key, key_paths[array])
            form = forms[array]
            weight = make_adapter(
                target,
                array,
                form,
                init=init,
                dtype=dtype,
                key=key_,
                options=options_of[form.method],
            )
            edits[array.indices] = lambda _, weight=weight: weight
        edits[target.place.indices] = make_wrapper(target, rate)
    return rebuild(model, edits)


_ARGUMENTS = [
    name for name in inspect.signature(loraify).parameters if name != "options"
]


def unloraify(
    model: _Model,
    *,
    merge: bool = True,
    donate: bool = False,
    requantise: bool = False,
) -> _Model:
    """Takes the adapters out of a model. The tree structure, types and dtypes are those
    from before `lorax.loraify`, but for quantised bases, into which nothing can be
    merged: there are arrays in their place, of the dtypes that they stand for, and the
    structure is that from before `lorax.quantise`.

    !!! example

        ```python
        merged = lorax.unloraify(model)
        base = lorax.unloraify(model, merge=False)  # the very arrays of the base
        ```

    **Arguments:**

    - `model`: A model with adapters.
    - `merge`: Whether the updates are added to the base weights, in float32 or wider
        and rounded once. With `merge=False` they are dropped, and the base arrays
        themselves come back.
    - `donate`: Whether each merged weight is written over its base, so that no second
        copy of the weights is needed. The base arrays of `model` can then no longer be
        used, except for those that are also elsewhere in it. Quantised ones stay.
    - `requantise`: Whether weights that are merged into a quantised base are quantised
        again, in the format of the base and with the same blocks. What that rounds away
        may be as large as the update: `lorax.quantisation_error(merged, model)` tells.

    **Returns:**

    The model without adapters. Each weight has the sharding of its base: nothing is
    gathered. `model` itself is not changed, except for donated arrays.

    **Raises:**

    `ValueError` if there is no adapter, if any merged weight is not finite, or if
    `requantise` finds no quantised base, or one of another package. Nothing was changed
    then. Inside `jax.jit` the second is an error at run time.
    """
    check_whole(model, "lorax.unloraify({})")
    model = without_views(model, allow_scaled=True)
    places = Places(model)
    weights = [place for place in places.all if is_weight(place.node)]
    layers = [place for place in places.all if is_layer(place.node)]
    if not weights and not any(settle_layer(x.node) is not x.node for x in layers):
        raise ValueError(
            "`model` has no adapters to take out. Was it passed through "
            "`lorax.loraify`, and has it been merged before?"
        )
    if donate and not merge:
        raise ValueError(
            "`donate=True` writes merged weights over their bases, and `merge=False` "
            "merges none. Leave out one of them."
        )
    if requantise:
        check_can_requantise(weights, merge=merge)
    if merge:
        arrays = merge_weights(model, weights, donate=donate, requantise=requantise)
    else:
        arrays = [strip_adapters(place.node) for place in weights]
    edits: dict[tuple[int, ...], Callable[[Any], Any]] = {
        place.indices: lambda _, array=array: array
        for place, array in zip(weights, arrays)
    }
    edits |= {place.indices: settle_layer for place in layers}
    return rebuild(model, edits)


def make_wrapper(target: Target, rate: int | float) -> Callable[[Any], Any]:
    """A function that puts the layer for the module of `target` around it."""
    layer: Any = target.layer

    def wrap(node: Any) -> Any:
        module = node.wrapped if is_layer(node) else node
        if not layer.has_dropout:
            return layer(module)
        return layer(module, eqx.nn.Dropout(rate) if rate else None)

    return wrap


def _key_paths(targets: Sequence[Target]) -> dict[Place, str]:
    """The path that each array's key is derived from: its own, or that of the first
    place with the same array."""
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
            stacklevel=_CALLER,
        )
    return paths


# From a function that `loraify` calls, past it and past the decorator.
_CALLER = 4


def _warn_of_passed_over(reasons: Sequence[str]) -> None:
    if reasons:
        warnings.warn(
            f"Not adapted: {list_some(reasons, 5, separator='; ')}. Name them in "
            "`exclude` if that is meant.",
            stacklevel=_CALLER,
        )


def _check_model(model: Any) -> None:
    if isinstance(model, type):
        raise TypeError(
            f"`model` is the class {model.__name__} itself. Pass a model, such as "
            f"`{model.__name__}(...)`."
        )


def _check_dropouts(targets: Sequence[Target], dropouts: Sequence[Any]) -> None:
    for target, rate in zip(targets, dropouts):
        if not isinstance(rate, int | float | np.number) or not 0 <= rate < 1:
            raise ValueError(
                f"`dropout={rate!r}` must be a probability from 0 to below 1."
            )
        if rate and not target.layer.has_dropout:
            raise ValueError(
                f"`dropout={rate}` cannot be applied in {target.place.dotted}, a "
                f"{type(target.place.module).__name__}: only linear layers and "
                "convolutions have it. Give the others alone a rate, "
                "`dropout={'<pattern>': ...}`, or leave it out with `exclude`."
            )
