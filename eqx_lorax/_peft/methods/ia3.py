"""IA³ in files of PEFT: `ia3_l`, a scale of the outputs or of the inputs."""

import re

import numpy as np

from ..._methods import Ia3Weight
from ..config import Options
from ..tensors import Conv, Embedding
from .format import check_shape, ELSE, Format, has_turned, Layer


class Ia3(Format):
    """`(out, 1)`, or `(1, in)` for `feedforward_modules`; `(1, n, 1, ...)` for
    convolutions."""

    peft_type = "IA3"
    weight = Ia3Weight
    options = Options(
        frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}),
        rank=None,
        alpha=None,
        dropout=None,
        has_patterns=False,
    )
    names = ("ia3_l",)

    def refuse(self, counterpart):
        layout = counterpart.layout
        if isinstance(layout, Embedding):
            return "PEFT has no IA³ of embeddings"
        if isinstance(layout, Conv) and layout.window == 1:
            return "PEFT has no IA³ of `Conv1d`"
        return None

    def read(self, config, path, counterpart, tensors, shared):
        scales_inputs = _is_feedforward(config, path)
        if not scales_inputs and _has_bias(counterpart):
            raise ValueError(
                "it scales the outputs of a layer with a bias, the bias too, which is "
                "no change of its weight. Merge it in PyTorch, by `merge_and_unload()`"
            )
        if problem := _refuse_groups(counterpart, scales_inputs):
            raise ValueError(problem)
        axis = _find_axis(counterpart, scales_inputs)
        size = counterpart.shape[axis]
        check_shape("ia3_l", tensors["ia3_l"], _shape(counterpart, scales_inputs, size))
        arrays = dict(gain=tensors["ia3_l"].reshape(-1))
        return Layer(counterpart, arrays, dict(scaled_axes=(axis,)))

    def write(self, layers):
        tensors, of_inputs = {}, []
        for path, layer in layers.items():
            counterpart, gain = layer.counterpart, layer.arrays["gain"]
            axes = {x: _find_axis(counterpart, x) for x in (False, True)}
            if layer.settings["scaled_axes"] not in [(axis,) for axis in axes.values()]:
                raise ValueError(
                    f"{path}: PEFT scales all of a window alike, and this one has a "
                    f"scale of the axes {layer.settings['scaled_axes']}. {ELSE}."
                )
            scales_inputs = layer.settings["scaled_axes"] == (axes[True],)
            if problem := _refuse_groups(counterpart, scales_inputs):
                raise ValueError(f"{path}: {problem}. {ELSE}.")
            if not scales_inputs and _has_bias(counterpart):
                raise ValueError(
                    f"{path} has a bias, which PEFT scales together with the outputs, "
                    f"and here it is not scaled. {ELSE}."
                )
            of_inputs += [path] * scales_inputs
            shape = _shape(counterpart, scales_inputs, len(gain))
            tensors[f"{path}.ia3_l"] = gain.reshape(shape)
        return tensors, {
            "feedforward_modules": _name(of_inputs, layers),
            "init_ia3_weights": True,
        }

    def fill(self, like):
        return {name: np.ones_like(x) for name, x in like.arrays.items()}


def _is_feedforward(config, path):
    modules = config.get("feedforward_modules") or []
    if isinstance(modules, str):
        return bool(re.fullmatch(modules, path))
    # PEFT compares the last characters, not names.
    return any(path.endswith(x) for x in modules)


def _name(paths, every):
    """A `feedforward_modules` that matches these of the adapted modules alone."""
    others = [path for path in every if path not in paths]
    if not paths or not any(x.endswith(path) for x in others for path in paths):
        return list(paths)
    return "|".join(map(re.escape, paths))


def _find_axis(counterpart, scales_inputs):
    """The axis, counted from the end, that is scaled."""
    ndim = len(counterpart.shape)
    outputs, inputs = (-1, -2) if has_turned(counterpart) else (-ndim, 1 - ndim)
    return inputs if scales_inputs else outputs


def _shape(counterpart, scales_inputs, size):
    layout = counterpart.layout
    if isinstance(layout, Conv):
        return (1, size, *(1 for _ in range(layout.window)))
    return (1, size) if scales_inputs else (size, 1)


def _has_bias(counterpart):
    owner = counterpart.place.owner
    return owner is not None and getattr(owner.module, "bias", None) is not None


def _refuse_groups(counterpart, scales_inputs):
    layout = counterpart.layout
    if scales_inputs and isinstance(layout, Conv) and layout.groups > 1:
        return (
            "in PEFT each input of a grouped convolution has a scale, and here the "
            "groups share them"
        )
    return None
