"""Helpers for the comparisons with the real PEFT."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llama

from eqx_lorax._peft.pytorch import expand, find_own_arrays, find_template
from eqx_lorax._trees import Places


AGAINST_PEFT = [
    pytest.mark.interop,
    # Warnings from PEFT and PyTorch are not for us to fix.
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("as_for_users"),
]

# PyTorch is imported where it is used: other tests run without it.


def in_peft(model, folder):
    """The PyTorch model with the adapter in `folder`. PEFT must find all of its
    tensors."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def by_peft(model, folder, **config):
    """The PyTorch model with a random adapter made by PEFT, which is saved to
    `folder`."""
    import peft
    import torch

    config = peft.LoraConfig(init_lora_weights=False, **config)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.2
    model.save_pretrained(folder)
    return model


def numpy(x):
    return x.detach().numpy()


def tensor(x):
    import torch

    return torch.tensor(x)


def filled_from(model, named, names, is_turned=lambda path: False):
    """The Equinox model with the arrays of a PyTorch model, from its `named`
    parameters. `is_turned` decides by path whether an array is transposed here."""
    places = Places(model)
    found = {}
    for module in places.all:
        torch_path = find_template(names, module.path) if module.path else None
        if torch_path is None or not isinstance(module.node, eqx.Module):
            continue
        for array in find_own_arrays(module, places):
            parts = [
                numpy(named[f"{path}.{array.path[-1]}"])
                for _, path in expand(torch_path, array.node.shape)
            ]
            if is_turned(array.path):
                parts = [part.T for part in parts]
            found[array.indices] = np.stack(parts).reshape(array.node.shape)
    steps = [place.indices for place in places.all if place.is_array]
    assert found.keys() == set(steps)
    leaves, treedef = jax.tree.flatten(model)
    arrays = iter(steps)
    new = [jnp.asarray(found[next(arrays)]) if eqx.is_array(x) else x for x in leaves]
    return jax.tree.unflatten(treedef, new)


def ours_on(model, tokens):
    """The outputs of the Equinox model for a batch."""
    return _ours_on(model, jnp.asarray(tokens))


@eqx.filter_jit
def _ours_on(model, tokens):
    return jax.vmap(lambda tokens: model(tokens))(tokens)


def through_layers(layers, activation, x):
    """`x` after a stack of layers, each followed by an activation."""
    arrays, rest = eqx.partition(layers, eqx.is_array)

    def body(x, arrays):
        return activation(jax.vmap(eqx.combine(arrays, rest))(x)), None

    return jax.lax.scan(body, x, arrays)[0]


def llama_pair(key, *, is_tied=False, **sizes):
    """A Llama of `transformers`, and the same in Equinox."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=is_tied,
        **sizes,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    named = dict(theirs.named_parameters(remove_duplicate=False))
    ours = tiny_llama.Llama(
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        key,
    )
    return filled_from(ours, named, tiny_llama.NAMES), theirs
