"""One small model with every kind of layer, in PyTorch and in Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from peft_helpers import filled_from, through_layers


NAMES = {
    "words": "words",
    "layers": "layer.{}",
    "conv": "conv",
    "image": "image",
    "head": "classifier",
}
TOKENS = np.random.default_rng(0).integers(0, 11, (5, 8))


class Ours(eqx.Module):
    words: eqx.nn.Embedding
    layers: eqx.nn.Linear
    """Two of them, stacked."""
    conv: eqx.nn.Conv1d
    image: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jr.split(key, 5)
        make = eqx.filter_vmap(lambda key: eqx.nn.Linear(6, 6, key=key))
        self.words = eqx.nn.Embedding(11, 6, key=keys[0])
        self.layers = make(jr.split(keys[1], 2))
        self.conv = eqx.nn.Conv1d(6, 8, 3, stride=2, padding=1, key=keys[2])
        self.image = eqx.nn.Conv2d(4, 6, (2, 3), key=keys[3])
        self.head = eqx.nn.Linear(6, 3, use_bias=False, key=keys[4])

    def __call__(self, tokens):
        x = through_layers(self.layers, jnp.tanh, jax.vmap(self.words)(tokens))
        x = self.image(self.conv(x.T).reshape(4, 2, 4))
        return self.head(jnp.tanh(x.mean((1, 2))))


def make_theirs():
    import torch
    from torch import nn

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.layer = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.conv = nn.Conv1d(6, 8, 3, stride=2, padding=1)
            self.image = nn.Conv2d(4, 6, (2, 3))
            self.classifier = nn.Linear(6, 3, bias=False)

        def forward(self, tokens):
            x = self.words(tokens)
            for layer in self.layer:
                x = torch.tanh(layer(x))
            x = self.image(self.conv(x.transpose(1, 2)).reshape(-1, 4, 2, 4))
            return self.classifier(torch.tanh(x.mean((2, 3))))

    torch.manual_seed(0)
    return Theirs()


def make_pair(key):
    theirs = make_theirs()
    return filled_from(Ours(key), dict(theirs.named_parameters()), NAMES), theirs
