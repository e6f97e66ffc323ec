"""AdaLoRA in files of PEFT: `lora_A`, `lora_B` and the singular values `lora_E`."""

import re

import numpy as np

from ..._methods import AdaLoraWeight
from ..config import Options
from ..tensors import Conv, Embedding
from .format import (
    check_shape,
    from_torch,
    Layer,
    matrix_shape,
    multiply,
    pad,
    ScaledFormat,
    to_torch,
)


# What PEFT adds to the rank.
_EPSILON = 1e-5


class AdaLora(ScaledFormat):
    """The scale is `lora_alpha / (init_r + 1e-5)`, also of a layer that was pruned."""

    peft_type = "ADALORA"
    weight = AdaLoraWeight
    options = Options(
        frozenset(
            {
                "beta1",
                "beta2",
                "deltaT",
                "fan_in_fan_out",
                "init_lora_weights",
                "lora_alpha",
                "megatron_core",
                "orth_reg_weight",
                "qalora_group_size",
                "r",
                "rank_pattern",
                "target_r",
                "tfinal",
                "tinit",
                "total_step",
            }
        ),
        rank="init_r",
        has_patterns=False,
    )
    names = ("lora_A", "lora_B", "lora_E", "ranknum")
    scaled_names = ("gate",)

    def list_wanted(self, found):
        # Older versions of PEFT have the rank of the scale as a tensor.
        return self.names if "ranknum" in found else self.names[:3]

    def refuse(self, counterpart):
        layout = counterpart.layout
        if isinstance(layout, Embedding):
            return "PEFT has no AdaLoRA of embeddings"
        if isinstance(layout, Conv) and (layout.window, layout.groups) != (2, 1):
            return "PEFT has AdaLoRA of `Conv2d` without groups alone"
        return None

    def rank_of(self, layer):
        return layer.arrays["gate"].shape[0]

    def read(self, config, path, counterpart, tensors, shared):
        start = config.get("init_r", 12)
        rank = _find_rank(config, path, start)
        rows, columns = matrix_shape(counterpart)
        check_shape("lora_A", tensors["lora_A"], (rank, columns))
        check_shape("lora_B", tensors["lora_B"], (rows, rank))
        check_shape("lora_E", tensors["lora_E"], (rank, 1))
        ranknum = float(np.asarray(tensors.get("ranknum", start)).reshape(()))
        alpha = config.get("lora_alpha", 8)
        scale = (alpha if alpha > 0 else start) / (ranknum + _EPSILON)
        b, a, gate = tensors["lora_B"], tensors["lora_A"], tensors["lora_E"][:, 0]
        if rank == 0:  # All was pruned: there is no weight of rank 0 here.
            b, a, gate = pad(b, 1, 1), pad(a, 0, 1), pad(gate, 0, 1)
        b, a = from_torch(counterpart, b, a)
        # Without the last digits, so that what is written comes back.
        alpha = float(f"{scale * len(gate):.12g}")
        settings = dict(alpha=alpha, rank_stabilised=False)
        return Layer(counterpart, dict(b=b, a=a, gate=gate), settings)

    def write(self, layers):
        start = max(map(self.rank_of, layers.values()))
        scales = {path: _scale_of(layer) for path, layer in layers.items()}
        scale = next(iter(scales.values()))
        tensors, pattern = {}, {}
        for path, layer in layers.items():
            rank = self.rank_of(layer)
            b, a = to_torch(layer.counterpart, layer.arrays["b"], layer.arrays["a"])
            gate = multiply(layer.arrays["gate"], scales[path] / scale)
            tensors |= {
                f"{path}.lora_A": a,
                f"{path}.lora_B": b,
                f"{path}.lora_E": gate[:, None],
            }
            if rank < start:
                pattern[f"{path}.lora_E"] = [i < rank for i in range(start)]
        return tensors, {
            "init_r": start,
            "target_r": start,
            "lora_alpha": scale * (start + _EPSILON),
            "rank_pattern": pattern or None,
            "init_lora_weights": True,
            # PEFT requires a number.
            "total_step": 1,
        }


def _scale_of(layer):
    rank = len(layer.arrays["gate"])
    power = 0.5 if layer.settings["rank_stabilised"] else 1.0
    return layer.settings["alpha"] / rank**power


def _find_rank(config, path, start):
    """How many directions are left of a module."""
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("`rank_pattern` is no object. Save the adapter again in PEFT")
    for key, left in patterns.items():
        if re.sub(r"\.lora_E(\.[^.]+)?$", "", key) == path:
            return int(np.sum(left))
    return start
