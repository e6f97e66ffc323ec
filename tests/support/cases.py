"""The table of layers: `test_layers.py` checks every property for each of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array


class OwnLinear(eqx.Module):
    """A linear layer as users write it: its own arrays, multiplied with `@`."""

    kernel: Array
    offset: Array

    def __init__(self, n_in, n_out, dtype=None, *, key):
        self.kernel = jr.normal(key, (n_in, n_out), dtype)
        self.offset = jnp.zeros(n_out, dtype)

    def __call__(self, x):
        return x @ self.kernel + self.offset


class SubLinear(eqx.nn.Linear):
    """A subclass, with another forward pass."""

    def __call__(self, x, *, key=None):
        return 2 * (self.weight @ x) + self.bias


class WideLinear(eqx.nn.Linear):
    """A subclass that inherits the forward pass, with additional fields and methods."""

    width: int
    extra: Array

    def __init__(self, width, dtype, *, key):
        super().__init__(width, width + 2, dtype=dtype, key=key)
        self.width = width
        self.extra = jnp.ones((width, width), dtype)

    @property
    def double(self):
        return 2 * self.width

    def expanded(self, x):
        return self.weight @ (self.extra @ x)


class SubConv(eqx.nn.Conv2d):
    """A subclass with another name."""


class TiedHead(eqx.Module):
    """An embedding whose table is also the head."""

    embedding: eqx.nn.Embedding

    def __call__(self, i):
        return self.embedding(i) @ self.embedding.weight.T


class Attention(eqx.Module):
    mha: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.mha(x, x, x)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Any]
    """Makes the layer from a dtype and a key."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the inputs, `()` for an integer."""
    filter: Any = None
    rank: int = 2
    integer: bool = False
    layer: str = "LoraLinear"
    complex: bool = True

    def inputs(self, dtype):
        if self.integer:
            return (jnp.array(3),)
        random = np.random.default_rng(1)
        return tuple(jnp.asarray(random.normal(size=s), dtype) for s in self.shapes)


def _conv(name, dims, *args, shape, cls=eqx.nn.Conv, rank=2, **kwargs):
    def make(dtype, key):
        if cls in (eqx.nn.Conv, eqx.nn.ConvTranspose):
            return cls(dims, *args, **kwargs, dtype=dtype, key=key)
        return cls(*args, **kwargs, dtype=dtype, key=key)

    return Case(name, make, (shape,), layer="LoraConv", rank=rank)


_T = eqx.nn.ConvTranspose

LAYERS = [
    Case("linear", lambda d, k: eqx.nn.Linear(5, 7, dtype=d, key=k), ((5,),)),
    Case(
        "linear without bias",
        lambda d, k: eqx.nn.Linear(5, 7, use_bias=False, dtype=d, key=k),
        ((5,),),
    ),
    Case(
        "linear scalar in",
        lambda d, k: eqx.nn.Linear("scalar", 7, dtype=d, key=k),
        ((),),
        rank=1,
    ),
    Case(
        "linear scalar out",
        lambda d, k: eqx.nn.Linear(5, "scalar", dtype=d, key=k),
        ((5,),),
        rank=1,
    ),
    _conv("conv1d", 1, 3, 5, 4, shape=(3, 11)),
    _conv("Conv1d strided", 1, 3, 5, 4, 2, 1, shape=(3, 11), cls=eqx.nn.Conv1d),
    _conv(
        "Conv2d", 2, 3, 5, (3, 2), (2, 1), (1, 0), shape=(3, 9, 8), cls=eqx.nn.Conv2d
    ),
    _conv("Conv3d", 3, 2, 5, 2, shape=(2, 4, 5, 6), cls=eqx.nn.Conv3d),
    _conv("conv SAME", 2, 3, 5, 4, 2, padding="SAME", shape=(3, 9, 8)),
    _conv("conv SAME_LOWER", 2, 3, 5, 4, 2, padding="SAME_LOWER", shape=(3, 9, 8)),
    _conv("conv asymmetric", 2, 3, 5, 3, padding=((1, 2), (0, 3)), shape=(3, 7, 8)),
    _conv("conv dilated", 2, 3, 5, 3, padding=2, dilation=(2, 3), shape=(3, 9, 10)),
    _conv("conv grouped", 2, 6, 4, 3, groups=2, shape=(6, 7, 8), rank=3),
    _conv("conv depthwise", 2, 5, 5, 3, groups=5, shape=(5, 7, 8), rank=4),
    _conv("conv depthwise ×2", 1, 5, 10, 3, groups=5, padding=1, shape=(5, 12), rank=3),
    *(
        _conv(
            f"conv {mode.lower()} {padding}",
            2,
            3,
            5,
            3,
            stride=(1, 2),
            padding=padding,
            dilation=(1, 2),
            padding_mode=mode,
            shape=(3, 9, 8),
        )
        for mode in ("REFLECT", "REPLICATE", "CIRCULAR")
        for padding in ("SAME", ((1, 0), (2, 1)))
    ),
    _conv("transposed", 1, 3, 5, 4, 2, shape=(3, 7), cls=_T),
    _conv(
        "ConvTranspose2d",
        2,
        3,
        5,
        (3, 2),
        stride=(2, 3),
        padding=(1, 0),
        output_padding=(1, 2),
        shape=(3, 5, 4),
        cls=eqx.nn.ConvTranspose2d,
    ),
    _conv(
        "transposed SAME",
        2,
        3,
        5,
        4,
        stride=2,
        padding="SAME",
        output_padding=1,
        shape=(3, 5, 4),
        cls=_T,
    ),
    _conv(
        "transposed SAME_LOWER",
        2,
        3,
        5,
        2,
        stride=3,
        padding="SAME_LOWER",
        shape=(3, 5, 4),
        cls=_T,
    ),
    _conv(
        "transposed grouped dilated",
        1,
        6,
        4,
        3,
        stride=2,
        padding=((1, 2),),
        output_padding=1,
        dilation=2,
        groups=2,
        shape=(6, 7),
        cls=_T,
    ),
    _conv(
        "transposed circular",
        1,
        3,
        5,
        5,
        stride=2,
        padding="SAME",
        padding_mode="CIRCULAR",
        shape=(3, 7),
        cls=_T,
    ),
    Case(
        "embedding",
        lambda d, k: eqx.nn.Embedding(11, 7, dtype=d, key=k),
        ((),),
        eqx.nn.Embedding,
        integer=True,
        layer="LoraEmbedding",
    ),
    Case(
        "own linear",
        lambda d, k: OwnLinear(5, 7, dtype=d, key=k),
        ((5,),),
        "kernel",
        layer="LoraModule",
    ),
    Case(
        "subclass",
        lambda d, k: SubLinear(5, 7, dtype=d, key=k),
        ((5,),),
        layer="LoraModule",
    ),
    Case("wide linear", lambda d, k: WideLinear(5, d, key=k), ((5,),)),
    _conv("subclass of Conv2d", 2, 3, 5, 3, shape=(3, 9, 8), cls=SubConv),
    Case(
        "gru",
        lambda d, k: eqx.nn.GRUCell(5, 7, dtype=d, key=k),
        ((5,), (7,)),
        "weight_*",
        layer="LoraModule",
        complex=False,
    ),
]

MODELS = [
    Case(
        "lstm",
        lambda d, k: _Lstm(eqx.nn.LSTMCell(5, 7, dtype=d, key=k)),
        ((5,), (7,)),
        "cell.weight_*",
        layer="LoraModule",
        complex=False,
    ),
    Case(
        "attention",
        lambda d, k: Attention(eqx.nn.MultiheadAttention(2, 6, dtype=d, key=k)),
        ((5, 6),),
        complex=False,
    ),
    Case(
        "mlp",
        # Not `tanh`: near its poles in the complex plane it amplifies rounding.
        lambda d, k: eqx.nn.MLP(5, 3, 11, 2, activation=softsign, dtype=d, key=k),
        ((5,),),
    ),
    Case(
        "tied head",
        lambda d, k: TiedHead(eqx.nn.Embedding(11, 7, dtype=d, key=k)),
        ((),),
        "embedding",
        integer=True,
        layer="LoraEmbedding",
    ),
]


class _Lstm(eqx.Module):
    cell: eqx.nn.LSTMCell

    def __call__(self, x, h):
        h, _ = self.cell(x, (h, jax.nn.relu(h)))
        return h


CONVOLUTIONS = ("Conv2d", "conv depthwise ×2", "transposed grouped dilated")
# For properties that do not depend on the padding of a convolution.
FEW = [
    case
    for case in [*LAYERS, *MODELS]
    if case.layer != "LoraConv" or case.name in CONVOLUTIONS
]
# One of each kind, for the README's test command; the others are heavy.
QUICK = ("linear", "Conv2d", "conv depthwise ×2", "embedding", "own linear", "mlp")


def softsign(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.abs(x)).astype(x.dtype)


def _parametrised(cases: list[Case]) -> pytest.MarkDecorator:
    params = [
        pytest.param(case, marks=() if case.name in QUICK else pytest.mark.heavy)
        for case in cases
    ]
    return pytest.mark.parametrize("case", params, ids=by_name)


def by_name(case: Case) -> str:
    return case.name.replace(" ", "-")


every_case = _parametrised([*LAYERS, *MODELS])
few_cases = _parametrised(FEW)
