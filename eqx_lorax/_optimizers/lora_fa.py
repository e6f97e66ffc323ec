"""LoRA-FA: the gradient of `b` for a frozen `a` that is not orthogonal."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array

from .._methods import is_weight, list_weights, LoraFaWeight, unfuse
from .._shared import PyTree
from .gram import adjoint, Gram, identity_like
from .trees import (
    as_before,
    column_matrices,
    has_arrays,
    no_adapters,
    prepare,
    row_matrices,
)


def lora_fa(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    model: PyTree,
    *,
    delta: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """The corrected gradient of LoRA-FA, for weights whose factor `a` is frozen.

    A gradient step of `b` changes the weight by the full gradient times `s² · aᵀ a`. To
    come as near to the step of full fine-tuning as `a` allows, the gradient of `b`
    becomes `(1 / s²) · g · (a aᵀ)⁻¹` before `optimizer` sees it; `s` is the scale. The
    inverse, of `rank × rank` numbers for each weight, is computed once, here.

    !!! example

        ```python
        model = lorax.loraify(model, method="lora_fa", key=key)
        params, frozen = lorax.partition(model)
        optimizer = lorax.lora_fa(optax.adamw(1e-4), frozen)
        ```

    **Arguments:**

    - `optimizer`: Any Optax optimizer.
    - `model`: The model with its adapters, of the method `"lora_fa"`, or the `frozen`
        part of it, or the parameters of `lorax.init_lora`. Only their factors `a` are
        read. Whatever else is trained is left to `optimizer`.
    - `delta`: Is added to the diagonal of `a aᵀ`, which is inverted by a
        pseudo-inverse, as in PEFT.

    **Returns:**

    An Optax optimizer for the `params` of `lorax.partition(model)`, or, within
    `lorax.wrap_optimizer`, for the parameters of `lorax.init_lora`.

    **Raises:**

    `ValueError` if `model` has no weights of this method, or lacks their factors `a`;
    and by `update`, if the weights that are trained are not those of `model`.

    ??? cite

        [LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
        Fine-tuning](https://arxiv.org/abs/2308.03303). The correction is that of PEFT's
        `create_lorafa_optimizer`.
    """
    inner = prepare(optimizer)
    # TPUs and GPUs multiply in fewer bits by default, too few for an inverse.
    with jax.default_matmul_precision("highest"):
        inverses = {
            path: _invert(weight, delta)
            for path, weight in _list_weights(model).items()
        }
    if not inverses:
        found = sorted({unfuse(x).method for x in list_weights(model)})
        has = f"has weights of {', '.join(found)}" if found else "has no adapters"
        raise ValueError(
            f"`model` {has}, and this optimizer is for those whose factor `a` is "
            'frozen. Adapt it by `lorax.loraify(model, method="lora_fa", key=key)`.'
        )

    def init(params: PyTree) -> Any:
        trained = _list_weights(params)
        if not trained:
            raise no_adapters("no weights of the method 'lora_fa'", _FIX)
        for path, weight in trained.items():
            if has_arrays(weight, "b"):
                _find_inverse(path, row_matrices(weight, weight.b), inverses)
        return inner.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        nodes, structure = jtu.tree_flatten_with_path(updates, is_leaf=is_weight)
        corrected = [
            _correct(node, path, inverses) if _is_lora_fa(node) else node
            for path, node in nodes
        ]
        return inner.update(structure.unflatten(corrected), state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


_FIX = (
    "Make the optimizer and its state from the same model: "
    "`params, frozen = lorax.partition(model)`, `lorax.lora_fa(optimizer, frozen)`."
)


def _is_lora_fa(node: Any) -> bool:
    return is_weight(node) and isinstance(unfuse(node), LoraFaWeight)


def _list_weights(tree: PyTree) -> dict[Any, Any]:
    """The weights of this method, by their paths."""
    nodes, _ = jtu.tree_flatten_with_path(tree, is_leaf=is_weight)
    return {path: node for path, node in nodes if _is_lora_fa(node)}


def _invert(weight: Any, delta: float) -> Array:
    """`(1 / s²) (a aᵀ)⁻¹`, of shape `(*batch, rank, rank)`."""
    if isinstance(weight.a, jax.ShapeDtypeStruct):
        raise ValueError(
            "`model` has shapes in the place of arrays, which cannot be inverted. To "
            "plan a training step, pass `optimizer` itself to `lorax.plan`: the state "
            "is the same."
        )
    if not has_arrays(weight, "a"):
        raise ValueError(
            "`model` is an adapter without its frozen part, the `params` of "
            "`lorax.partition`, and the factors `a` are there. Call "
            "`lorax.lora_fa(optimizer, frozen)` with its second result."
        )
    return _invert_products(column_matrices(weight, weight.a), delta, weight.scale)


@jax.jit
def _invert_products(a: Array, delta: Any, scale: Any) -> Array:
    # Of complex factors JAX's gradient is the conjugate of the direction of ascent.
    a = jnp.conj(a)
    products = a @ adjoint(a)
    products = products + delta * identity_like(products)
    return Gram(products).inverse / scale**2


def _correct(weight: Any, path: Any, inverses: dict[Any, Array]) -> Any:
    if not has_arrays(weight, "b"):
        return weight
    g = row_matrices(weight, weight.b)
    inverse = _find_inverse(path, g, inverses)
    new = as_before(g @ inverse.astype(g.dtype), weight.b)
    return weight.with_base(weight.w, b=new)


def _find_inverse(path: Any, g: Array, inverses: dict[Any, Array]) -> Array:
    """That of the weight at a path, whose matrices `g` fit it."""
    inverse = inverses.get(path)
    shape = None if inverse is None else inverse.shape
    if inverse is None or shape != (*g.shape[:-2], g.shape[-1], g.shape[-1]):
        raise ValueError(
            f"The weight at {jtu.keystr(path)} is trained, and `model` has another one "
            f"there, or none. {_FIX}"
        )
    return inverse
