"""AdaLoRA: the importance of triplets, and pruning down to a budget."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from .._methods import AdaLoraWeight, is_weight, unfuse
from .._shared import accumulation_dtype, as_array, is_array, PyTree
from .budget import Budget
from .importance import keep_best, list_parts, score, smooth
from .trees import (
    as_before,
    list_kind,
    no_adapters,
    no_params,
    prepare,
    replace_kind,
)


class AdaLoraState(NamedTuple):
    """The state of `lorax.adalora`."""

    step: Array
    """How many steps were done."""

    inner: Any
    """The state of the optimizer inside."""

    importance: PyTree
    """Of the structure of the parameters, with the smoothed sensitivity of each entry
    of a triplet, and `None` for everything else."""

    uncertainty: PyTree
    """Likewise, how much the sensitivity varies."""

    kept: PyTree
    """Likewise, in the place of each gate, which of its triplets were left when it was
    pruned last."""


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
        return AdaLoraState(
            step=as_array(0, jnp.int32),
            inner=inner.init(params),
            # Two trees of zeros, because the buffers of a state may be donated.
            importance=_select(params, _zeros),
            uncertainty=_select(params, _zeros),
            kept=_select(params, lambda x: jnp.ones_like(x, bool), ("gate",)),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, AdaLoraState]:
        if params is None:
            raise no_params("adalora")
        step = state.step + 1
        weights, gradients = _list_weights(params), _list_weights(updates)
        smoothed = _list_weights(state.importance), _list_weights(state.uncertainty)
        importance, uncertainty = smooth(
            weights, gradients, smoothed, step < schedule.last, (beta1, beta2)
        )
        updates, inner_state = inner.update(updates, state.inner, params, **extra)

        is_pruned = (step > warmup_steps) & (step < schedule.last)
        is_pruned = is_pruned & (step % interval == 0) | (step == schedule.last)
        scores = [score(*x) for x in zip(importance, uncertainty, strict=True)]
        start, target = sum(x.size for x in scores), count_target(weights)
        table = as_array(schedule.tabulate(start, target))
        budget = table[jnp.minimum(step // interval, len(table) - 1)]
        budget = jnp.where(step >= schedule.last, target, budget)
        old = _list_weights(state.kept)
        new = [as_before(x, y.gate) for x, y in zip(keep_best(scores, budget), old)]
        kept = [
            y.with_base(None, gate=jnp.where(is_pruned, x, y.gate))
            for x, y in zip(new, old)
        ]
        is_masked = is_pruned | (step > schedule.last)
        changes = zip(_list_weights(updates), weights, kept, strict=True)
        masked = [_mask_gate(*x, is_masked) for x in changes]
        return _replace_weights(updates, masked), AdaLoraState(
            step,
            inner_state,
            _replace_weights(state.importance, importance),
            _replace_weights(state.uncertainty, uncertainty),
            _replace_weights(state.kept, kept),
        )

    return optax.GradientTransformationExtraArgs(init, update)


_FIX = (
    'Adapt by `lorax.loraify(model, method="adalora", key=key)`, and pass the `params` '
    "of `lorax.partition(model)`."
)


def _is_adalora(node: Any) -> bool:
    return isinstance(unfuse(node), AdaLoraWeight) and is_array(node.gate)


_list_weights = functools.partial(list_kind, is_kind=_is_adalora)


def _replace_weights(tree: PyTree, new: list[Any]) -> PyTree:
    return replace_kind(tree, _is_adalora, new)


def _select(
    params: PyTree, make: Any, names: tuple[str, ...] = ("b", "a", "gate")
) -> PyTree:
    """A tree like `params`, so that its arrays are known to belong to theirs, with
    `make(x)` for each array `x` of the triplets, and `None` for every other."""

    def select(node: Any) -> Any:
        empty = jax.tree.map(lambda _: None, node)
        if not (is_weight(node) and _is_adalora(node)):
            return empty
        found = {name: make(getattr(node, name)) for name in list_parts(node)}
        return empty.with_base(None, **{x: found[x] for x in found if x in names})

    return jax.tree.map(select, params, is_leaf=is_weight)


def _zeros(x: Array) -> Array:
    return jnp.zeros_like(x, accumulation_dtype(jnp.real(x).dtype))


def _mask_gate(update: Any, weight: Any, kept: Any, is_masked: Array) -> Any:
    """The update of a weight, such that its gate becomes exactly zero where it is not
    kept."""
    change = update.gate.astype(weight.gate.dtype)
    change = jnp.where(kept.gate | ~is_masked, change, -weight.gate)
    return update.with_base(update.w, gate=change)
