"""The printed forms of adapted layers and weights: short, and with their own names.

Equinox prints Wadler-Lindig documents. An object may have its own, by `__pdoc__`.
"""

import dataclasses
from typing import Any


def weight_document(weight: Any, **options: Any) -> Any:
    """`LoraWeight(f32[4,8], rank=2, scale=1.0)`. Where there is something else than
    arrays in the place of the factors, `None`: it prints like any other module."""
    # The caller has imported it already.
    import wadler_lindig as wl

    if not all(hasattr(factor, "shape") for factor in (weight.b, weight.a)):
        return None
    named = {"rank": weight.rank, "scale": weight.scale}
    named |= {
        name: getattr(weight, name)
        for name in ("permutation", "gain", "gate")
        if getattr(weight, name, None) is not None
    }
    return _call(weight, [wl.pdoc(weight.w, **options)], named, options)


def layer_document(layer: Any, **options: Any) -> Any:
    """`LoraLinear(weight=..., bias=..., ...)` for an `equinox.nn.Linear`, and
    `LoraModule(GRUCell(...))` where the layer's name does not name the module."""
    import wadler_lindig as wl

    module = layer.wrapped
    named = {
        field.name: getattr(layer, field.name)
        for field in dataclasses.fields(type(layer))
        if field.name != "wrapped" and getattr(layer, field.name) is not None
    }
    if type(layer).__name__ != f"Lora{type(module).__name__}":
        return _call(layer, [wl.pdoc(module, **options)], named, options)
    shown = [field.name for field in dataclasses.fields(module) if field.repr]
    fields = {name: getattr(module, name, None) for name in shown}
    return _call(layer, [], {**fields, **named}, options)


def _call(
    node: Any, documents: list[Any], named: dict[str, Any], options: dict[str, Any]
) -> Any:
    import wadler_lindig as wl

    return wl.bracketed(
        begin=wl.TextDoc(f"{type(node).__name__}("),
        docs=[*documents, *wl.named_objs(named.items(), **options)],
        sep=wl.comma,
        end=wl.TextDoc(")"),
        indent=options["indent"],
    )
