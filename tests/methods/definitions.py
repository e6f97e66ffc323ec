"""The methods as their papers define them: the dense matrix of each, in plain
`jax.numpy`, with nothing of the library but the names of fields."""

from types import SimpleNamespace

import jax
import jax.lax as lax
import jax.numpy as jnp


def form_dense(weight):
    """The dense array of a weight of any method, in the dtype of its arrays."""
    define = DEFINITIONS[weight.method]
    names = [name for name in weight.array_axes() if getattr(weight, name) is not None]
    arrays = {name: jnp.asarray(getattr(weight, name)) for name in names}
    arrays["w"] = w = jnp.asarray(weight.w)

    def of_one(arrays):
        rows = len(weight.rows)
        shape = arrays["w"].shape
        matrix = arrays["w"].reshape(_size(shape[:rows]), _size(shape[rows:]))
        fields = SimpleNamespace(**{**arrays, "w": matrix})
        return define(fields, weight).reshape(shape)

    for _ in range(w.ndim - len(weight.rows) - len(weight.columns)):
        of_one = jax.vmap(of_one)
    return of_one(arrays)


def _size(shape):
    size = 1
    for x in shape:
        size *= x
    return size


def _product(b, a):
    """`b · a` with rows and columns flattened."""
    rank = b.shape[-1]
    return b.reshape(-1, rank) @ a.reshape(rank, -1)


def _scale(weight, rank):
    return weight.alpha / (rank**0.5 if weight.rank_stabilised else rank)


def lora(x, weight):
    return x.w + _scale(weight, x.b.shape[-1]) * _product(x.b, x.a)


def relative_lora(x, weight):
    change = _product(x.b, x.a) - _product(x.b_start, x.a_start)
    return x.w + _scale(weight, x.b.shape[-1]) * change


def dora(x, weight):
    v = relative_lora(x, weight) if weight.is_relative else lora(x, weight)
    axis = 1 if weight.outputs == "rows" else 0
    norm = lax.stop_gradient(jnp.linalg.norm(v, axis=axis, keepdims=True))
    return jnp.expand_dims(x.magnitude.reshape(-1), axis) * v / norm


def vera(x, weight):
    to_outputs, from_inputs = weight._random_factors()
    to_outputs, from_inputs = (
        y[(0,) * (y.ndim - 2)].astype(x.w.dtype) for y in (to_outputs, from_inputs)
    )
    left = x.output_gain.reshape(-1, 1) * to_outputs
    update = left @ (x.rank_gain[:, None] * from_inputs)
    return x.w + (update if weight.outputs == "rows" else update.T)


def loha(x, weight):
    scale = _scale(weight, x.b1.shape[-1])
    return x.w + scale * _product(x.b1, x.a1) * _product(x.b2, x.a2)


def lokr(x, weight):
    w1 = x.w1 if hasattr(x, "w1") else x.w1_b @ x.w1_a
    w2 = x.w2 if hasattr(x, "w2") else x.w2_b @ x.w2_a
    return x.w + _scale(weight, weight.factor_rank) * jnp.kron(w1, w2)


def lora_xs(x, weight):
    b = x.b.reshape(-1, x.b.shape[-1])
    return x.w + _scale(weight, x.core.shape[-1]) * _product(b @ x.core, x.a)


def adalora(x, weight):
    return x.w + _scale(weight, x.gate.shape[-1]) * _product(
        x.b @ jnp.diag(x.gate), x.a
    )


def ia3(x, weight):
    # Outputs, or inputs, which a window may follow.
    if weight.scaled_axes == weight.rows:
        return jnp.diag(x.gain.reshape(-1)) @ x.w
    return x.w @ jnp.diag(jnp.repeat(x.gain.reshape(-1), x.w.shape[1] // x.gain.size))


def full(x, weight):
    return x.w + x.delta.reshape(x.w.shape)


def tokens(x, weight):
    return x.w.at[jnp.asarray(weight.indices)].add(
        x.delta.reshape(x.delta.shape[0], -1)
    )


def segments(x, weight):
    w = x.w if weight.outputs == "rows" else x.w.T
    scale = _scale(weight, x.to_outputs.shape[-1])
    parts = jnp.split(w, weight.parts)
    for i, part in enumerate(weight.segments):
        parts[part] = parts[part] + scale * x.to_outputs[i] @ x.from_inputs[i]
    w = jnp.concatenate(parts)
    return w if weight.outputs == "rows" else w.T


DEFINITIONS = {
    "lora": lora,
    "lora_fa": lora,
    "relative_lora": relative_lora,
    "dora": dora,
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "lora_xs": lora_xs,
    "adalora": adalora,
    "ia3": ia3,
    "full": full,
    "tokens": tokens,
    "segments": segments,
}
