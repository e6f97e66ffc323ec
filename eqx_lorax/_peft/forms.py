"""What PEFT can hold of the adapters of a model."""

from typing import Any, TypeVar

import jax

from .._methods import DoraWeight, is_weight, join_start, LoraWeight, TokensWeight
from .._shared import list_some
from .methods import BY_METHOD


_Model = TypeVar("_Model")


def as_written(model: _Model) -> _Model:
    """`model`, whose adapters are all of one method that PEFT has, in the form that it
    has there: what is measured from its start has twice the rank.

    **Raises:**

    `ValueError` if any is of a method that PEFT has not, or if they are of several.
    """
    methods: dict[str, str] = {}

    def convert(path: Any, weight: Any) -> Any:
        if not is_weight(weight):
            return weight
        converted = _convert(f"model{jax.tree_util.keystr(path)}", weight)
        methods.setdefault(converted.method, f"model{jax.tree_util.keystr(path)}")
        return converted

    converted = jax.tree_util.tree_map_with_path(convert, model, is_leaf=is_weight)
    beside = {LoraWeight.method, DoraWeight.method, TokensWeight.method}
    if len(methods) > 1 and not (
        len(methods) == 2 and set(methods) < beside and TokensWeight.method in methods
    ):
        listed = list_some([f"{name!r} ({at})" for name, at in methods.items()])
        raise ValueError(
            f"The adapters are of several methods, {listed}, and a folder of PEFT has "
            "one. Convert them all with `lorax.as_lora(model, rank)`, or save them "
            "with `lorax.save_adapter`."
        )
    return converted


def _are_together(methods: set[str]) -> bool:
    """Whether one folder of PEFT can have these methods: trained rows beside LoRA or
    DoRA."""
    others = methods - {TokensWeight.method}
    return len(others) == 1 and others <= {LoraWeight.method, DoraWeight.method}


def _convert(path: str, weight: Any) -> Any:
    if isinstance(weight, DoraWeight):
        return _without_start(weight)
    if isinstance(weight, LoraWeight | TokensWeight) or weight.method in BY_METHOD:
        return weight
    if weight.is_plain_lora:
        return LoraWeight.from_factored(weight.factored())
    raise ValueError(
        f"`{path}` is adapted by the method {weight.method!r}, which PEFT's LoRA "
        "cannot hold. Convert it with `lorax.as_lora(model)`, or save it with "
        "`lorax.save_adapter`."
    )


def _without_start(weight: DoraWeight) -> DoraWeight:
    """The same weight with factors that are measured from zero, of twice the rank."""
    if not weight.is_relative:
        return weight
    b, a = join_start(weight)
    more = 2**0.5 if weight.rank_stabilised else 2
    changes = dict(b=b, a=a, b_start=None, a_start=None, is_relative=False)
    return weight.with_base(weight.w, alpha=weight.alpha * more, **changes)
