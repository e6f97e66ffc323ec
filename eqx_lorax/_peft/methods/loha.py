"""LoHa in files of PEFT: `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`."""

from ..._methods import LohaWeight
from ..config import find_alpha, find_rank, make_patterns, Options
from ..tensors import Conv, Embedding
from .format import check_shape, from_torch, Layer, matrix_shape, ScaledFormat, to_torch


class Loha(ScaledFormat):
    """Kernels of convolutions are matrices `(out, in / groups · window)`."""

    peft_type = "LOHA"
    weight = LohaWeight
    options = Options(
        frozenset(
            {"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
        ),
        alpha="alpha",
        dropout=None,
    )
    names = (
        "hada_w1_a",
        "hada_w1_b",
        "hada_w2_a",
        "hada_w2_b",
        "hada_t1",
        "hada_t2",
    )
    untrained = ("rank_dropout", "module_dropout")
    scaled_names = ("a2",)

    def list_wanted(self, found):
        return self.names[:4]

    def refuse(self, counterpart):
        return refuse_lycoris(counterpart, "LoHa")

    def rank_of(self, layer):
        return layer.arrays["b1"].shape[-1]

    def read(self, config, path, counterpart, tensors, shared):
        rank = find_rank(config, path)
        rows, columns = matrix_shape(counterpart)
        for name, x in tensors.items():
            is_row = name.endswith("a")
            check_shape(name, x, (rows, rank) if is_row else (rank, columns))
        w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in self.names[:4])
        b1, a1 = from_torch(counterpart, w1_a, w1_b)
        b2, a2 = from_torch(counterpart, w2_a, w2_b)
        settings = dict(alpha=find_alpha(config, path, "alpha"), rank_stabilised=False)
        return Layer(counterpart, dict(b1=b1, a1=a1, b2=b2, a2=a2), settings)

    def write(self, layers):
        tensors = {}
        for path, layer in layers.items():
            pairs = (("b1", "a1"), ("b2", "a2"))
            arrays = [
                x
                for b, a in pairs
                for x in to_torch(layer.counterpart, layer.arrays[b], layer.arrays[a])
            ]
            for name, x in zip(self.names, arrays):
                tensors[f"{path}.{name}"] = x
        return tensors, write_scales(self, layers)


def write_scales(format, layers):
    """The options of ranks and alphas."""
    ranks = {path: format.rank_of(layer) for path, layer in layers.items()}
    alphas = {path: alpha_of(layer, ranks[path]) for path, layer in layers.items()}
    (r, rank_pattern), (alpha, alpha_pattern) = map(make_patterns, (ranks, alphas))
    return {
        "r": r,
        "rank_pattern": rank_pattern,
        "alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "init_weights": True,
        "use_effective_conv2d": False,
    }


def alpha_of(layer, rank):
    """The alpha that gives the scale if the rank divides it."""
    alpha = layer.settings["alpha"]
    return alpha * rank**0.5 if layer.settings["rank_stabilised"] else alpha


def refuse_lycoris(counterpart, name):
    """Why PEFT has no LoHa, or no LoKr, of a layer."""
    layout = counterpart.layout
    if isinstance(layout, Embedding):
        return f"PEFT has no {name} of embeddings"
    if isinstance(layout, Conv) and layout.window > 2:
        return f"PEFT has no {name} of convolutions with {layout.window} axes"
    return None
