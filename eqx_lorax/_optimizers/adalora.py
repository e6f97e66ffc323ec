"""AdaLoRA: the importance of triplets, and pruning down to a budget."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._methods import AdaLoraWeight, is_weight, unfuse
from .._shared import accumulation_dtype, as_array
from .budget import Budget
from .trees import (
    column_matrices,
    has_arrays,
    no_adapters,
    no_params,
    prepare,
    row_matrices,
)


class AdaLoraState(NamedTuple):
    """The state of `lorax.adalora`."""

    step: Array
    """How many steps were done."""

    inner: Any
    """The state of the optimizer inside."""

    importance: list[dict[str, Array]]
    """For each weight, by field, the smoothed sensitivity of every entry."""

    uncertainty: list[dict[str, Array]]
    """Likewise, how much the sensitivity varies."""

    kept: list[Array]
    """For each weight, which triplets were left when it was pruned last."""


def adalora(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    *,
    target_rank: int | float,
    total_steps: int,
    warmup_steps: int,
    final_steps: int,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """AdaLoRA: prunes the least important triplets of all weights, down to a budget.

    A triplet is a column of `b`, an entry of the gate, and a row of `a`. Its importance
    comes from the products of parameters and gradients, smoothed over steps (equations
    8 to 10), summed as in equation 7. Every `interval` steps the gates of the least
    important ones are set to zero. Gradients go on, so that a triplet may come back
    until the last phase, in which what is pruned stays pruned.

    | steps | what happens | in PEFT |
    |---|---|---|
    | the first `warmup_steps` | all triplets are trained | `tinit` |
    | between | the budget sinks to the target along a cubic curve | every `deltaT` |
    | the last `final_steps` | what is left is trained | `tfinal` |

    Set the gates' updates last: this has to be the outermost transformation, but for
    `lorax.wrap_optimizer` and `optax.MultiSteps`.

    !!! example

        ```python
        model = lorax.loraify(model, method="adalora", rank=12, key=key)
        params, frozen = lorax.partition(model)
        optimizer = lorax.adalora(
            optax.adamw(1e-3),
            target_rank=8,
            total_steps=1000,
            warmup_steps=100,
            final_steps=300,
            interval=10,
        )
        ```

    **Arguments:**

    - `optimizer`: Any Optax optimizer.
    - `target_rank`: How many triplets are left in the end, on average over all weights,
        each layer of a stack counted as one.
    - `total_steps`: How many updates there will be in all.
    - `warmup_steps`: How many of them are before the first pruning.
    - `final_steps`: How many of them are after the last.
    - `interval`: How many steps are between two prunings.
    - `beta1`, `beta2`: How slowly sensitivity and uncertainty follow the steps.

    **Returns:**

    An Optax optimizer for the `params` of `lorax.partition`, or, within
    `lorax.wrap_optimizer`, for the parameters of `lorax.init_lora`. It needs the
    parameters, as third argument of `update`. Its state has two numbers, in float32 or
    wider, for each entry of the weights. If fewer steps are done than `total_steps`
    says, the target may not be reached.

    **Raises:**

    `ValueError` if the steps leave none for pruning, or a `beta` is not between 0 and
    1; by `init`, if there are no weights of AdaLoRA, or they have not more triplets
    than the target; by `update`, without parameters.

    ??? cite

        [AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
        Fine-Tuning](https://arxiv.org/abs/2303.10512), equations 5 to 11 and
        algorithm 1. The curve of the budget is that of PEFT and of the authors' code,
        where equation 11 has a fraction that does not start at one.
    """
    schedule = Budget(total_steps, warmup_steps, final_steps, interval)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 < beta < 1:
            raise ValueError(
                f"`{name}={beta}` has to be between 0 and 1. Pass 0.85, as the paper."
            )
    inner = prepare(optimizer)

    def count_target(weights: list[Any]) -> int:
        matrices = sum(x.gate.size // x.gate.shape[-1] for x in weights)
        return round(target_rank * matrices)

    def init(params: PyTree) -> AdaLoraState:
        weights = _list_weights(params)
        if not weights:
            raise no_adapters("no weights of AdaLoRA", _FIX)
        start, target = sum(x.gate.size for x in weights), count_target(weights)
        if not 0 < target < start:
            raise ValueError(
                f"`target_rank={target_rank}` are {target} triplets in all, of {start} "
                "that the weights have. Give a smaller positive one, or adapt with a "
                "larger rank."
            )
        # Not the same zeros twice: they may be donated to the step.
        importance, uncertainty = (
            [{name: _zeros(x) for name, x in _parts(w).items()} for w in weights]
            for _ in range(2)
        )
        kept = [jnp.ones_like(x.gate, bool) for x in weights]
        step = as_array(0, jnp.int32)
        state = inner.init(params)
        return AdaLoraState(step, state, importance, uncertainty, kept)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, AdaLoraState]:
        if params is None:
            raise no_params("adalora")
        weights, gradients = _list_weights(params), _list_weights(updates)
        step = state.step + 1
        importance, uncertainty = _smooth(
            state, weights, gradients, step < schedule.last, beta1, beta2
        )
        updates, inner_state = inner.update(updates, state.inner, params, **extra)

        is_pruned = (step > warmup_steps) & (step < schedule.last)
        is_pruned = is_pruned & (step % interval == 0) | (step == schedule.last)
        scores = [_score(*x) for x in zip(weights, importance, uncertainty)]
        start, target = sum(x.size for x in scores), count_target(weights)
        table = as_array(schedule.tabulate(start, target))
        budget = table[jnp.minimum(step // interval, len(table) - 1)]
        budget = jnp.where(step >= schedule.last, target, budget)
        new = _keep_best(scores, budget)
        kept = [jnp.where(is_pruned, x, y) for x, y in zip(new, state.kept)]
        is_masked = is_pruned | (step > schedule.last)
        updates = _mask_gates(updates, weights, kept, is_masked)
        return updates, AdaLoraState(step, inner_state, importance, uncertainty, kept)

    return optax.GradientTransformationExtraArgs(init, update)


_FIX = (
    'Adapt by `lorax.loraify(model, method="adalora", key=key)`, and pass the `params` '
    "of `lorax.partition(model)`."
)


def _is_adalora(node: Any) -> bool:
    is_kind = is_weight(node) and isinstance(unfuse(node), AdaLoraWeight)
    return is_kind and has_arrays(node, "gate")


def _list_weights(tree: PyTree) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=is_weight) if _is_adalora(x)]


def _parts(weight: Any) -> dict[str, Array]:
    """The trained arrays of a triplet."""
    names = [name for name in ("b", "a", "gate") if has_arrays(weight, name)]
    return {name: getattr(weight, name) for name in names}


def _zeros(x: Array) -> Array:
    return jnp.zeros_like(x, accumulation_dtype(jnp.real(x).dtype))


def _smooth(
    state: AdaLoraState,
    weights: list[Any],
    gradients: list[Any],
    is_counted: Array,
    beta1: float,
    beta2: float,
) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """Equations 8 to 10: sensitivity, and how uncertain it is, both smoothed."""
    importance, uncertainty = [], []
    for i, (weight, gradient) in enumerate(zip(weights, gradients)):
        importance.append({})
        uncertainty.append({})
        for name, x in _parts(weight).items():
            old, unsure = state.importance[i][name], state.uncertainty[i][name]
            g = getattr(gradient, name).astype(accumulation_dtype(x.dtype))
            found = jnp.abs(x.astype(g.dtype) * g)
            smooth = beta1 * old + (1 - beta1) * found
            spread = beta2 * unsure + (1 - beta2) * jnp.abs(found - smooth)
            importance[i][name] = jnp.where(is_counted, smooth, old)
            uncertainty[i][name] = jnp.where(is_counted, spread, unsure)
    return importance, uncertainty


def _score(
    weight: Any, importance: dict[str, Array], uncertainty: dict[str, Array]
) -> Array:
    """Equation 7: the importance of each triplet, of the shape of the gate."""
    entries = {name: x * uncertainty[name] for name, x in importance.items()}
    score = entries["gate"]
    if "b" in entries:
        score = score + row_matrices(weight, entries["b"]).mean(-2)
    if "a" in entries:
        score = score + column_matrices(weight, entries["a"]).mean(-1)
    return score


def _keep_best(scores: list[Array], budget: Array) -> list[Array]:
    """Which triplets are the `budget` most important ones. Of equals, later ones."""
    flat = jnp.concatenate([x.ravel() for x in scores])
    places = jnp.argsort(jnp.argsort(flat))
    is_kept = places >= flat.size - budget
    kept, done = [], 0
    for x in scores:
        kept.append(is_kept[done : done + x.size].reshape(x.shape))
        done += x.size
    return kept


def _mask_gates(
    updates: PyTree, weights: list[Any], kept: list[Array], is_masked: Array
) -> PyTree:
    """The updates, such that a gate that is not kept becomes exactly zero."""
    rest = iter(zip(weights, kept, strict=True))

    def mask(node: Any) -> Any:
        if not _is_adalora(node):
            return node
        weight, keep = next(rest)
        change = node.gate.astype(weight.gate.dtype)
        change = jnp.where(keep | ~is_masked, change, -weight.gate)
        return node.with_base(node.w, gate=change)

    return jax.tree.map(mask, updates, is_leaf=is_weight)
