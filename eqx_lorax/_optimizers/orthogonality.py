"""The penalty that keeps the factors of AdaLoRA near to orthogonal."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from .._methods import AdaLoraWeight, list_weights, unfuse
from .._shared import PyTree
from .gram import adjoint, identity_like
from .trees import column_matrices, has_arrays, row_matrices


def orthogonality(model: PyTree) -> Array:
    """How far the factors of AdaLoRA are from orthogonal, to be added to the loss.

    It is the mean of `‖bᵀ b - 1‖` and `‖a aᵀ - 1‖`, Frobenius norms, over all matrices,
    each layer of a stack counted as one. That is what PEFT and the authors' code add to
    the loss, PEFT times `orth_reg_weight`, 0.5 by default. Equation 4 of the paper has
    the squares, and their sum.

    !!! example

        ```python
        @lorax.filter_value_and_grad
        def loss(model):
            return task_loss(model) + 0.5 * lorax.orthogonality(model)
        ```

    **Arguments:**

    - `model`: A model with adapters of the method `"adalora"`, or parameters of
        `lorax.init_lora`. Only factors are read, so that `params` will do.

    **Returns:**

    A scalar, in float32 or wider.

    **Raises:**

    `ValueError` if there are no such adapters.

    ??? cite

        [AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
        Fine-Tuning](https://arxiv.org/abs/2303.10512), equation 4.
    """
    norms: list[Array] = []
    weights: list[Any] = [unfuse(x) for x in list_weights(model)]
    for weight in [x for x in weights if isinstance(x, AdaLoraWeight)]:
        if has_arrays(weight, "b"):
            b = row_matrices(weight, weight.b)
            norms.append(_distance(adjoint(b) @ b).ravel())
        if has_arrays(weight, "a"):
            a = column_matrices(weight, weight.a)
            norms.append(_distance(a @ adjoint(a)).ravel())
    if not norms:
        raise ValueError(
            "`model` has no factors of AdaLoRA, which this is for. Adapt it by "
            '`lorax.loraify(model, method="adalora", key=key)`.'
        )
    return jnp.mean(jnp.concatenate(norms))


def _distance(gram: Array) -> Array:
    rest = gram - identity_like(gram)
    squares = jnp.sum(jnp.real(rest * jnp.conj(rest)), axis=(-2, -1))
    # The root has no gradient at zero.
    is_zero = squares == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
