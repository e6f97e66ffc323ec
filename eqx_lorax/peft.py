"""Adapters in the format of PEFT, HuggingFace's library for PyTorch: a folder with
`adapter_config.json` and `adapter_model.safetensors`.

Equinox's layers have PyTorch's layout, so the numbers are the same. Only the paths
differ, and `names` translates them.

??? cite

    [PEFT: State-of-the-art Parameter-Efficient Fine-Tuning
    methods](https://github.com/huggingface/peft), its checkpoint format in version
    0.21.
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
    as_written,
    check_ties,
    collect_whole,
    export_adapter,
    find_in_out,
    find_tied_tables,
    has_prefix,
    import_adapter,
    load_weights as load_weights,
    Names as Names,
    PREFIX,
    read_folder,
    save_weights as save_weights,
    strip_names,
    to_key,
)
from ._shared import replicate, write_once
from ._trees import Filter, Places, rebuild


__all__ = ["load", "load_weights", "Names", "save", "save_weights"]

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
    expert weights `(experts, out, in)` are written as PEFT has them. Modules with
    arrays that `also` names are saved whole. Biases are saved alone where PEFT does
    that too: all of the model, or those of the adapted layers. Every update is exactly
    the one here: ranks and alphas that differ go to `rank_pattern` and
    `alpha_pattern`, and the rank of a grouped convolution, whose groups share `a`, is
    multiplied by the number of groups.

    The methods are LoRA, DoRA, VeRA, LoHa, LoKr, AdaLoRA and IA³, one for each folder,
    and trained tokens beside LoRA or DoRA.
    What is measured from its start, as by `init="pissa"`, is written with twice the
    rank, for the original base.

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
    - `names`: The path in PyTorch for the path of each module here; for an array that
        is not called `weight`, for the path of the array. It is a mapping, in whose
        keys `*` stands for one name, or a function that returns `None` for paths that
        it does not know. Each `{}` in the path in PyTorch is filled with a name that
        `*` stood for, or then with the position in a stack of layers. A batch axis
        without `{}` is one of experts, and the path is then that of PyTorch's
        parameter.
    - `also`: What else was trained, see `lorax.partition`.
    - `transposed`: A filter, see `lorax.loraify`, for the arrays here that are stored
        `(..., in, out)`, because their module computes `x @ weight`. Other arrays that
        belong to none of Equinox's layers are taken to be `(..., out, in)`. It does not
        matter how PyTorch stores them: in PEFT `A` is on the inputs.
    - `parameter_order`: The names (or the ends of the paths) of several parameters of
        one module of PyTorch, in the order in which this module defines them. Nothing
        else tells PEFT which of their tensors is whose. It is needed only if two have
        the same shapes. Others are taken to be in the order that they have here, and
        PEFT raises an error if they are not.
    - `tied`: The tables here that are heads too (`x @ words.weight.T`, or by
        `eqx.nn.Shared`), each with the path of the head in PyTorch:
        `{"words": "lm_head"}`. The head there gets the same adapter. An empty mapping
        says that there is none, which cannot be seen here.
    - `base_model_name_or_path`, `task_type`: Written to the configuration, such as
        `"sentence-transformers/all-MiniLM-L6-v2"` and `"SEQ_CLS"`.

    **Raises:**

    `ValueError` if `names` lacks a path or gives one path twice, or if PEFT has no form
    for an adapter: other methods or several at once, transposed convolutions, adapters
    on top of adapters.
    """
    check_whole(model, "lorax.peft.save(directory, {}, names=names)")
    model = as_written(without_views(model))
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
    base = fingerprint_base(places, whole.saved)
    folder = Path(directory)
    arrays = {
        to_key(name): np.array(replicate(x), order="C") for name, x in tensors.items()
    }
    metadata = {"format": "pt", _BASE: json.dumps(base)}
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

    !!! example

        ```python
        model = lorax.peft.load("adapter", plain_model, names=names)
        ```

    **Arguments:**

    - `directory`: The folder with `adapter_config.json` and
        `adapter_model.safetensors`.
    - `model`: The plain model.
    - `names`: See `lorax.peft.save`. The paths in PyTorch are those in the model that
        was given to `peft.get_peft_model`.
    - `transposed`: See `lorax.peft.save`. An empty list says that there are none, which
        is needed if the configuration has `fan_in_fan_out` and an array is square.
    - `parameter_order`: See `lorax.peft.save`, which writes it to the folder. It is
        needed only for folders by PEFT, and only if shapes and ranks leave it open.
    - `tied`: See `lorax.peft.save`. The folder must have the same adapter for both.
    - `trainable`: Whether training goes on, as `is_trainable` in PEFT. Otherwise the
        dropout of the adapted layers is switched off. They keep its rate, and
        `eqx.nn.inference_mode(model, False)` switches it on.
    - `allow_other_base`: See `lorax.load_adapter`. Of the base, PEFT writes only the
        weights of adapted embeddings and heads. Folders by `lorax.peft.save` have
        fingerprints of all of it.

    **Returns:**

    The adapted model, with the modules that were saved whole in their places.

    **Raises:**

    `lorax.AdapterFileError`, a `ValueError`, if any tensor has no place in the model,
    is missing or has the wrong shape, if the configuration mentions more than there is,
    or if the adapter uses anything that `lorax.peft.save` does not write. PEFT itself
    ignores most of these. It is raised for other files too: a pickle
    (`adapter_model.bin`), which is never opened, an adapter in parts, a whole model,
    files of diffusers or kohya's scripts. The message says what there is and what to
    do. `OSError` if nothing can be read there.
    """
    check_whole(model, "lorax.peft.load(directory, {}, names=names)")
    folder = Path(directory)
    config, metadata, tensors = read_folder(folder)
    model = without_views(model)
    places = Places(model)
    in_out, ties = find_in_out(places, transposed), find_tied_tables(places, tied)
    order = parse_content(folder, lambda: _read_order(metadata)) or parameter_order
    base = parse_content(folder, lambda: _read_base(metadata))
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
    return adapted if trainable else _switch_off_dropout(adapted)


def _read_order(metadata: Mapping[str, str]) -> list[str] | None:
    """The order of parameters that `save` has written, if it did."""
    order = json.loads(metadata.get(_ORDER, "null"))
    if order is not None and not isinstance(order, list):
        raise TypeError(f"the order of its parameters is {order!r}, which is no list")
    return order


def _read_base(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The fingerprints of the base that `save` has written, if it did."""
    base = json.loads(metadata.get(_BASE, "null"))
    return None if base is None else dict(base)


def _switch_off_dropout(model: _Model) -> _Model:
    """The model with the dropout of adapted layers switched off. Other dropout
    stays."""
    edits = {
        place.indices: lambda layer: eqx.tree_at(
            lambda layer: layer.dropout.inference, layer, True
        )
        for place in Places(model).all
        if is_layer(place.node) and place.node.has_dropout and place.node.dropout
    }
    return rebuild(model, edits)
