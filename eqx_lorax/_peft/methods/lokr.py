"""LoKr in files of PEFT: `lokr_w1`, `lokr_w2`, each whole or as a product."""

import numpy as np

from ..._methods import LokrWeight, split_size
from ..config import find_alpha, find_rank, Options
from ..tensors import Conv
from .format import check_shape, ELSE, has_turned, Layer, ScaledFormat
from .loha import refuse_lycoris, write_scales


_PAIRS = ("w1", "w2")


class Lokr(ScaledFormat):
    """`kron(w1, w2)` of `w1 (l, m)` and `w2 (k, n, *window)`, which is whole, or a
    product of `(k, r)` and `(r, n · window)`."""

    peft_type = "LOKR"
    weight = LokrWeight
    options = Options(
        frozenset(
            {
                "decompose_both",
                "decompose_factor",
                "init_weights",
                "module_dropout",
                "rank_dropout",
                "rank_dropout_scale",
                "use_effective_conv2d",
            }
        ),
        alpha="alpha",
        dropout=None,
    )
    names = (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    )
    untrained = ("rank_dropout", "module_dropout")
    scaled_names = ("w1", "w1_b")

    def list_wanted(self, found):
        return tuple(
            name
            for part in _PAIRS
            for name in (
                (f"lokr_{part}",)
                if f"lokr_{part}" in found
                else (f"lokr_{part}_a", f"lokr_{part}_b")
            )
        )

    def refuse(self, counterpart):
        return refuse_lycoris(counterpart, "LoKr")

    def rank_of(self, layer):
        return layer.settings["factor_rank"]

    def read(self, config, path, counterpart, tensors, shared):
        if "lokr_w2" in tensors and _is_exchanged(counterpart):
            raise ValueError(f"{_EXCHANGED}. Merge it in PyTorch, by {_MERGE}")
        rank = find_rank(config, path)
        sizes = _split(counterpart, config.get("decompose_factor", -1))
        arrays = {}
        for part, (rows, columns, *window) in zip(_PAIRS, sizes):
            flat = int(np.prod([columns, *window]))
            name = f"lokr_{part}"
            if name in tensors:
                check_shape(name, tensors[name], (rows, columns, *window))
                arrays[part] = tensors[name].reshape(rows, flat)
            else:
                b, a = tensors[f"{name}_a"], tensors[f"{name}_b"]
                check_shape(f"{name}_a", b, (rows, rank))
                check_shape(f"{name}_b", a, (rank, flat))
                arrays |= {f"{part}_b": b, f"{part}_a": a}
        settings = dict(
            alpha=find_alpha(config, path, "alpha"),
            rank_stabilised=False,
            factor_rank=rank,
            decomposed=tuple(part not in arrays for part in _PAIRS),
        )
        return Layer(counterpart, _turn(counterpart, arrays), settings)

    def write(self, layers):
        decompose_both = any(x.settings["decomposed"][0] for x in layers.values())
        factor = _find_factor(layers)
        tensors = {}
        for path, layer in layers.items():
            self._check_split(path, layer, factor, decompose_both)
            if "w2" in layer.arrays and _is_exchanged(layer.counterpart):
                raise ValueError(f"{path}: {_EXCHANGED}. {ELSE}.")
            arrays = _turn(layer.counterpart, layer.arrays)
            for name, x in arrays.items():
                part, _, side = name.partition("_")
                if not side and part == "w2":
                    columns, *window = _split(layer.counterpart, factor)[1][1:]
                    x = x.reshape(-1, columns, *window)
                side = {"": "", "b": "_a", "a": "_b"}[side]
                tensors[f"{path}.lokr_{part}{side}"] = x
        return tensors, write_scales(self, layers) | {
            "decompose_both": decompose_both,
            "decompose_factor": factor,
        }

    def _check_split(self, path, layer, factor, decompose_both):
        """Checks that PEFT makes the same arrays of these options.

        **Raises:**

        `ValueError` if it does not.
        """
        of_w1, of_w2 = _split(layer.counterpart, factor)
        rank = self.rank_of(layer)
        made = decompose_both and rank < max(of_w1) / 2, rank < max(of_w2[:2]) / 2
        if made != tuple(layer.settings["decomposed"]):
            raise ValueError(
                f"{path}: PEFT decides by rank and sizes which factors of LoKr are "
                f"products, {made} here, and this one has "
                f"{layer.settings['decomposed']}. {ELSE}."
            )


_EXCHANGED = (
    "PEFT (0.21) computes kron(w2, w1) for a `Conv1d` with a whole `lokr_w2`, and "
    "kron(w1, w2) for all other layers"
)
_MERGE = "`merge_and_unload()`, and load the merged weights"


def _is_exchanged(counterpart):
    """Whether PEFT exchanges the factors if `w2` is whole: `torch.kron` puts the axis
    that `w1` lacks, beside a `w2` of three axes, in front."""
    layout = counterpart.layout
    return isinstance(layout, Conv) and layout.window == 1


def _split(counterpart, factor):
    """The sizes `(l, m)` and `(k, n, *window)`, in PyTorch."""
    shape = counterpart.shape
    outputs, inputs = shape[:2][::-1] if has_turned(counterpart) else shape[:2]
    window = shape[2:] if isinstance(counterpart.layout, Conv) else ()
    rows, columns = split_size(outputs, factor), split_size(inputs, factor)
    first, second = zip(rows, columns)
    return first, (*second, *window)


def _find_factor(layers):
    """The `decompose_factor` that splits all layers as they are.

    **Raises:**

    `ValueError` if there is none.
    """
    sizes = {}
    for path, layer in layers.items():
        arrays = _turn(layer.counterpart, layer.arrays)
        is_whole = "w1" in arrays
        b, a = (arrays[x] for x in (("w1", "w1") if is_whole else ("w1_b", "w1_a")))
        sizes[path] = b.shape[0], a.shape[1]
    for factor in [-1, *sorted({x for pair in sizes.values() for x in pair})]:
        found = {path: _split(x.counterpart, factor)[0] for path, x in layers.items()}
        if found == sizes:
            return factor
    raise ValueError(
        "PEFT has one `decompose_factor` for all layers, and no number splits these as "
        f"they are: {sizes}. {ELSE}."
    )


def _turn(counterpart, arrays):
    """The arrays of the transposed weight, if the one here is stored `(in, out)`."""
    if not has_turned(counterpart):
        return arrays
    other = {"w1": "w1", "w2": "w2", "w1_b": "w1_a", "w1_a": "w1_b"}
    other |= {"w2_b": "w2_a", "w2_a": "w2_b"}
    return {other[name]: x.T for name, x in arrays.items()}
