"""LoRA-Pro: gradients of the factors whose step is that of full fine-tuning, as nearly
as the factors allow."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._methods import LoraWeight, RelativeLoraWeight, unfuse
from .._shared import PyTree
from .gram import adjoint, Gram, invert
from .trees import (
    as_before,
    column_matrices,
    has_arrays,
    map_weights,
    no_adapters,
    no_params,
    prepare,
    row_matrices,
)


def lora_pro(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro: adjusts the gradients of both factors before `optimizer` sees them.

    A small step along gradients `g_b` and `g_a` of the factors changes the weight along
    `s · (b g_a + g_b a)`. With LoRA's own gradients that is not the nearest that it can
    come to the gradient of the whole weight. The adjusted gradients are such that it
    is: it is the projection of the full gradient to all directions in which the factors
    can move the weight. They are computed from LoRA's gradients in closed form. Among
    the pairs that do this, the nearest to LoRA's own gradients is taken, by a Sylvester
    equation of size `rank × rank` for each weight.

    Directions in which `b` or `a` is zero are left out, as in a pseudo-inverse. So in
    the first step, when `b` is zero, only `b` moves.

    These are the gradients that `optimizer` gets, so Adam's moments have the shapes of
    the factors. The paper also has a variant that keeps moments of the size of the
    whole weight, for which this library has no place.

    !!! example

        ```python
        optimizer = lorax.lora_pro(optax.adamw(1e-4))
        updates, state = optimizer.update(grads, state, params)
        ```

    **Arguments:**

    - `optimizer`: Any Optax optimizer. Clip within it, as here, or the gradients that
        are clipped are LoRA's own.

    **Returns:**

    An Optax optimizer for the `params` of `lorax.partition`, or, within
    `lorax.wrap_optimizer`, for the parameters of `lorax.init_lora`. It needs the
    parameters, as third argument of `update`, and acts on plain LoRA, whatever start it
    had; other arrays that are trained, and other methods, are left to `optimizer`.

    **Raises:**

    `ValueError`, by `init`, if no weight is plain LoRA with two trained factors; by
    `update`, without parameters.

    ??? cite

        [LoRA-Pro: Are Low-Rank Adapters Properly
        Optimized?](https://arxiv.org/abs/2407.18242), theorems 2.1 and 2.3.
    """
    inner = prepare(optimizer)

    def init(params: PyTree) -> Any:
        found = []
        map_weights(found.append, params, is_kind=_is_lora)
        if not found:
            raise no_adapters("no plain LoRA with two trained factors", _FIX)
        return inner.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise no_params("lora_pro")
        # TPUs and GPUs multiply in fewer bits by default, too few for an inverse.
        with jax.default_matmul_precision("highest"):
            updates = map_weights(_adjust, updates, params, is_kind=_is_lora)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


_FIX = (
    "Pass the `params` of `lorax.partition(model)`, of a model with adapters of "
    '`method="lora"`; or use `optimizer` alone.'
)


def _is_lora(weight: Any) -> bool:
    is_lora = isinstance(unfuse(weight), LoraWeight | RelativeLoraWeight)
    return is_lora and has_arrays(weight, "b", "a")


def _adjust(gradient: Any, weight: Any) -> Any:
    """The gradient of a weight, adjusted."""
    b, a = row_matrices(weight, weight.b), column_matrices(weight, weight.a)
    g_b, g_a = row_matrices(weight, gradient.b), column_matrices(weight, gradient.a)
    # Of complex factors JAX's gradient is the conjugate of the direction of ascent.
    g_b, g_a = adjust_gradients(b, a, jnp.conj(g_b), jnp.conj(g_a), weight.scale)
    new = {
        "b": as_before(jnp.conj(g_b), gradient.b),
        "a": as_before(jnp.conj(g_a), gradient.a),
    }
    return gradient.with_base(gradient.w, **new)


def adjust_gradients(
    b: Array, a: Array, g_b: Array, g_a: Array, scale: float
) -> tuple[Array, Array]:
    """The gradients of LoRA-Pro.

    **Arguments:**

    - `b`, `g_b`: `(*batch, rows, rank)`.
    - `a`, `g_a`: `(*batch, rank, columns)`.
    - `scale`: What multiplies `b · a`.
    """
    dtype = jnp.result_type(b.dtype, a.dtype)
    b, a, g_b, g_a = (x.astype(dtype) for x in (b, a, g_b, g_a))
    of_b, of_a = Gram(adjoint(b) @ b), Gram(a @ adjoint(a))
    # (BᴴB)⁺ g_A, and g_B (AAᴴ)⁺ without what `b` can already reach.
    from_a = of_b.inverse @ g_a / scale**2
    from_b = g_b @ of_a.inverse / scale**2
    from_b = from_b - b @ (of_b.inverse @ (adjoint(b) @ from_b))
    # BᴴB X + X AAᴴ = -(BᴴB)⁺ g_A Aᴴ, in the bases in which both are diagonal.
    sums = of_b.values[..., :, None] + of_a.values[..., None, :]
    right = adjoint(of_b.vectors) @ (from_a @ adjoint(a)) @ of_a.vectors
    x = of_b.vectors @ (-right * invert(sums).astype(dtype)) @ adjoint(of_a.vectors)
    return from_b - b @ x, from_a + x @ a
