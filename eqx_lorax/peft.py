"""Adapters in the format of PEFT, HuggingFace's library for PyTorch: a folder with
`adapter_config.json` and `adapter_model.safetensors`.

Equinox's layers have PyTorch's layout, so the numbers are the same; what differs are
the paths, which `names` translates.

??? cite

    [PEFT: State-of-the-art Parameter-Efficient Fine-Tuning
    methods](https://github.com/huggingface/peft), its checkpoint format as of 0.21.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from safetensors.numpy import save_file

from ._adapters import (
    AdapterFileError,
    check_base,
    extract_adapter,
    fingerprint_base,
    insert_adapter,
    parse_content,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    replace_file,
)
from ._layers import is_layer
from ._methods import check_whole
from ._modules import without_views
from ._peft import (
    check_ties,
    collect_whole,
    export_adapter,
    find_in_out,
    find_tied_tables,
    has_prefix,
    import_adapter,
    Names as Names,
    PREFIX,
    read_folder,
    strip_names,
)
from ._shared import replicate, write_once
from ._trees import Filter, Places, rebuild


__all__ = ["load", "Names", "save"]

_Model = TypeVar("_Model")

_BASE, _ORDER = "eqx_lorax_base", "eqx_lorax_parameter_order"
_WITHOUT_PREFIX = (
    f"\nNone of its tensors begins with {PREFIX}, as PEFT's do; they were taken as "
    "they are."
)


def save(
    directory: str | os.PathLike[str],
    model: Any,
    *,
    names: Names,
    also: Filter = None,
    transposed: Filter = None,
    parameter_order: Sequence[str] | None = None,
    tied: Mapping[str, str] | None = None,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes the adapters of a model so that PEFT on PyTorch loads them.

    Linear layers, convolutions, embeddings, stacks of them (each layer apart), and
    expert weights `(experts, out, in)` are written as PEFT has them; modules that
    `also` reaches into are saved whole, and biases alone where PEFT does that too: all
    of the model, or those of the adapted layers. Every update is exactly what it is
    here: ranks and alphas that differ go to `rank_pattern` and `alpha_pattern`, and a
    grouped convolution, whose `a` all groups share, has its rank multiplied by the
    groups.

    !!! example

        ```python
        lorax.peft.save(
            "adapter",
            model,
            names={"layers.*.attention.query": "encoder.layer.{}.attention.self.query"},
        )
        ```

    **Arguments:**

    - `directory`: The folder, which is made if it is not there.
    - `model`: A model with adapters.
    - `names`: From the path of each module here to that in PyTorch; for an array that
        is not called `weight`, from the array's. A mapping, in whose keys `*` stands
        for one name, or a function that returns `None` for what it does not know.
        `{}` in what is returned is filled with the names that `*` stood for, and then
        with the position in a stack of layers. A batch axis without `{}` is one of
        experts, and the path is then that of PyTorch's parameter.
    - `also`: What else was trained, as of `lorax.partition`.
    - `transposed`: A filter as of `lorax.loraify`: the arrays here that are stored
        `(..., in, out)`, because their module computes `x @ weight`. Otherwise arrays
        that belong to none of Equinox's layers are taken to be `(..., out, in)`. How
        PyTorch stores them does not matter: in PEFT `A` has the inputs.
    - `parameter_order`: The names (or the ends of the paths) of several parameters of
        one module of PyTorch, in the order in which this module defines them. PEFT
        knows by nothing else which of their tensors is whose. Only has to be said if
        two have the same shapes; others are taken to be in the order that they have
        here, and PEFT raises if they are not.
    - `tied`: The tables here that are heads too (`x @ words.weight.T`, or by
        `eqx.nn.Shared`), each with the path of the head in PyTorch:
        `{"words": "lm_head"}`. The head there gets the same adapter. An empty mapping
        says that there is none, which cannot be seen here.
    - `base_model_name_or_path`, `task_type`: Written to the configuration, such as
        `"sentence-transformers/all-MiniLM-L6-v2"` and `"SEQ_CLS"`.

    **Raises:**

    `ValueError` if `names` lacks a path or gives two the same, or if PEFT has no form
    for an adapter: transposed convolutions, adapters upon adapters.
    """
    check_whole(model, "lorax.peft.save(directory, {}, names=names)")
    model = without_views(model)
    places = Places(model)
    adapter = extract_adapter(model, places, also)
    whole = collect_whole(adapter, places, names)
    in_out = find_in_out(places, transposed)
    ties = find_tied_tables(places, tied)
    check_ties(places, adapter, ties, task_type)
    tensors, config = export_adapter(
        adapter, places, names, in_out, whole, parameter_order, ties
    )
    config |= {
        "base_model_name_or_path": base_model_name_or_path,
        "task_type": task_type,
    }
    digests = fingerprint_base(places, whole.saved)
    folder = Path(directory)
    arrays = {
        PREFIX + name: np.array(replicate(x), order="C") for name, x in tensors.items()
    }
    metadata = {"format": "pt", _BASE: json.dumps(digests)}
    if config.get("target_parameters"):
        metadata[_ORDER] = json.dumps(config["target_parameters"])

    def write() -> None:
        with replace_file(folder / PEFT_WEIGHTS) as new:
            save_file(arrays, new, metadata)
        with replace_file(folder / PEFT_CONFIG) as new:
            new.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    write_once(write, jax.tree.leaves(model))


def load(
    directory: str | os.PathLike[str],
    model: _Model,
    *,
    names: Names,
    transposed: Filter = None,
    parameter_order: Sequence[str] | None = None,
    tied: Mapping[str, str] | None = None,
    trainable: bool = False,
    allow_other_base: bool = False,
) -> _Model:
    """Puts an adapter that PEFT, or `lorax.peft.save`, has written into a plain model.

    **Arguments:**

    - `directory`: The folder with `adapter_config.json` and
        `adapter_model.safetensors`.
    - `model`: The plain model.
    - `names`: As of `lorax.peft.save`. The paths in PyTorch are those below the model
        that was given to `peft.get_peft_model`.
    - `transposed`: As of `lorax.peft.save`; an empty list says that there are none,
        which has to be said where the configuration has `fan_in_fan_out` and an array
        is square.
    - `parameter_order`: As of `lorax.peft.save`, which writes it down. Only has to be
        said of folders by PEFT, and only if shapes and ranks leave it open.
    - `tied`: As of `lorax.peft.save`. What is in the folder has to have the same
        adapter on both.
    - `trainable`: Whether it is to be trained on, as `is_trainable` of PEFT. Otherwise
        the dropout of its layers is switched off, whose rate stays on record;
        `eqx.nn.inference_mode(model, False)` switches it on.
    - `allow_other_base`: As of `lorax.load_adapter`. PEFT writes nothing about the
        base but the weights of adapted embeddings and heads; else this concerns files
        by `lorax.peft.save`.

    **Returns:**

    The adapted model, with the modules that were saved whole in their places.

    **Raises:**

    `lorax.AdapterFileError`, a `ValueError`, if any tensor has no place in the model,
    or is missing or misshapen, if the configuration promises more than there is, and if
    the adapter uses anything but plain LoRA. PEFT itself ignores most of these. So it
    is if there is something else: a pickle (`adapter_model.bin`), which is never
    opened, parts, a whole model, files of diffusers or kohya's scripts. The message
    says what it is and what to do. `OSError` if there is nothing that can be read.
    """
    check_whole(model, "lorax.peft.load(directory, {}, names=names)")
    folder = Path(directory)
    config, metadata, tensors = read_folder(folder)
    model = without_views(model)
    places = Places(model)
    in_out, ties = find_in_out(places, transposed), find_tied_tables(places, tied)
    order = parse_content(folder, lambda: _order(metadata)) or parameter_order
    base = parse_content(folder, lambda: _base(metadata))
    try:
        plain = strip_names(tensors)
        adapter = import_adapter(
            config, plain, places, names, in_out, order, allow_other_base, ties
        )
        check_ties(places, adapter, ties, config.get("task_type"))
        adapted = insert_adapter(model, places, adapter)
    except ValueError as error:
        note = _WITHOUT_PREFIX if tensors and not has_prefix(tensors) else ""
        raise AdapterFileError(f"{folder}: {error}{note}") from error
    if base is not None and not allow_other_base:
        check_base(folder, base, places, adapter.others)
    return adapted if trainable else _for_inference(adapted)


def _order(metadata: Mapping[str, str]) -> list[str] | None:
    """The order of parameters that `save` has written, if it did."""
    order = json.loads(metadata.get(_ORDER, "null"))
    return None if order is None else [str(name) for name in list(order)]


def _base(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The fingerprints of the base that `save` has written, if it did."""
    base = json.loads(metadata.get(_BASE, "null"))
    return None if base is None else dict(base)


def _for_inference(model: _Model) -> _Model:
    """With the dropout of adapted layers switched off; that of the model stays."""
    edits = {
        place.indices: lambda layer: eqx.tree_at(
            lambda layer: layer.dropout.inference, layer, True
        )
        for place in Places(model).all
        if is_layer(place.node) and place.node.has_dropout and place.node.dropout
    }
    return rebuild(model, edits)
