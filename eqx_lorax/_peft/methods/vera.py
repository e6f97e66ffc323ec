"""VeRA in files of PEFT: two vectors of each layer, and one pair of random matrices for
all layers."""

import jax.numpy as jnp
import numpy as np

from ..._methods import VeraWeight
from ..config import Options
from ..tensors import Linear
from .format import check_shape, ELSE, Format, Layer, matrix_shape, multiply, pad


class Vera(Format):
    """A layer has the first columns of `vera_A` and the first rows of `vera_B`."""

    peft_type = "VERA"
    weight = VeraWeight
    options = Options(
        frozenset(
            {
                "d_initial",
                "fan_in_fan_out",
                "init_weights",
                "projection_prng_key",
                "save_projection",
            }
        ),
        alpha=None,
        dropout="vera_dropout",
        has_patterns=False,
    )
    names = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")

    def refuse(self, counterpart):
        is_linear = isinstance(counterpart.layout, Linear)
        return None if is_linear else "PEFT has VeRA of linear layers alone"

    def read(self, config, path, counterpart, tensors, shared):
        if set(shared) != set(self.shared):
            raise ValueError(
                "the random matrices `vera_A` and `vera_B` are not in the file, and "
                "PyTorch's generator cannot be run here. Load it in PEFT, set "
                "`save_projection=True` in its configuration, and save it again"
            )
        outputs, inputs = matrix_shape(counterpart)
        rank = config.get("r", 256)
        check_shape("vera_lambda_b", tensors["vera_lambda_b"], (outputs,))
        check_shape("vera_lambda_d", tensors["vera_lambda_d"], (rank,))
        first, second = shared["vera_A"], shared["vera_B"]
        widest = max(inputs, *first.shape[1:]), max(outputs, *second.shape[:1])
        check_shape("vera_A", first, (rank, widest[0]))
        check_shape("vera_B", second, (widest[1], rank))
        arrays = dict(
            output_gain=tensors["vera_lambda_b"],
            rank_gain=tensors["vera_lambda_d"],
            to_outputs=second[:outputs],
            from_inputs=first[:, :inputs],
        )
        settings = dict(seed=None, outputs=counterpart.layout.outputs)
        return Layer(counterpart, arrays, settings)

    def write(self, layers):
        rank = max(x.arrays["rank_gain"].shape[0] for x in layers.values())
        for path, layer in layers.items():
            if layer.settings["outputs"] != layer.counterpart.layout.outputs:
                raise ValueError(
                    f"{path} has a gain of its inputs, and PEFT of the outputs. {ELSE}."
                )
        seeds = {layer.settings["seed"] for layer in layers.values()}
        if len(seeds) > 1:
            raise ValueError(
                "PEFT has one pair of random matrices for all layers, and these have "
                f"the seeds {seeds}. {ELSE}."
            )
        (seed,) = seeds
        shared = _join(layers) if seed is None else _draw(layers, rank, seed)
        tensors = dict(zip(self.shared, shared))
        for path, layer in layers.items():
            gain = layer.arrays["rank_gain"]
            if seed is not None:
                # Here entries have the range of the layer's own sizes.
                inputs, widest = matrix_shape(layer.counterpart)[1], shared[0].shape[1]
                gain = multiply(gain, (widest * rank / inputs / len(gain)) ** 0.5)
            tensors[f"{path}.vera_lambda_b"] = layer.arrays["output_gain"]
            tensors[f"{path}.vera_lambda_d"] = pad(gain, 0, rank - len(gain))
        return tensors, {
            "r": rank,
            "save_projection": True,
            "projection_prng_key": 0,
            "init_weights": True,
        }


def _draw(layers, rank, seed):
    """The matrices of a layer as wide as the widest, as `VeraWeight` draws them."""
    shapes = [matrix_shape(layer.counterpart) for layer in layers.values()]
    outputs, inputs = (max(sizes) for sizes in zip(*shapes))
    like = next(iter(layers.values())).arrays["rank_gain"]
    form = VeraWeight(
        jnp.zeros((outputs, inputs)),
        output_gain=jnp.ones(outputs, like.dtype),
        rank_gain=jnp.ones(rank, like.dtype),
        seed=seed,
    ).factored()
    return np.asarray(form.a), np.asarray(form.b)


def _join(layers):
    """The widest matrices, of which those of the other layers are the beginnings.

    **Raises:**

    `ValueError` if they are not.
    """
    firsts = {path: x.arrays["from_inputs"] for path, x in layers.items()}
    seconds = {path: x.arrays["to_outputs"] for path, x in layers.items()}
    first = max(firsts.values(), key=lambda x: x.shape[1])
    second = max(seconds.values(), key=lambda x: x.shape[0])
    for path in layers:
        if not (
            np.array_equal(first[:, : firsts[path].shape[1]], firsts[path])
            and np.array_equal(second[: seconds[path].shape[0]], seconds[path])
        ):
            raise ValueError(
                "PEFT has one pair of random matrices for all layers, and those of "
                f"{path} are not the beginnings of the widest. {ELSE}."
            )
    return first, second
