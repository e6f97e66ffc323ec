"""LoRA+: a larger learning rate for the factor on the output side."""

import math
from typing import Any

import jax
import optax

from .._methods import AbstractLoraWeight
from .._shared import is_inexact, multiply, PyTree
from .trees import (
    list_output_factors,
    map_weights_with_outputs,
    no_adapters,
    prepare,
    Side,
)


def lora_plus(
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    ratio: int | float = 16.0,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: the factor on the output side of each weight learns `ratio` times as fast.

    What `optimizer` returns for this factor is multiplied by `ratio`. That is what
    `optimizer` itself would do with a learning rate `ratio` times as large, decoupled
    weight decay included, if its update is linear in the learning rate and its state
    does not depend on it. So it is for SGD with or without momentum, Adam, AdamW, Lion,
    Adafactor without weight decay and so on, with any schedule. It is not for those
    that find a step size of their own (line searches, Prodigy, D-Adaptation), and not
    for `schedule_free`, whose state depends on the learning rate.

    In layers of modules the factor is `b`, and in embeddings it is `a`, whose columns
    are the features. For parameters of `lorax.init_lora` it is the factor that owns the
    last axis, which is `a` by default: kernels there are `(in, out)`. The factors of
    LoHa and of segments are treated alike. Everything else keeps its learning rate:
    heads, biases, the magnitude of DoRA, and methods without such factors.

    !!! example

        ```python
        optimizer = lorax.lora_plus(optax.adamw(1e-4), ratio=16)
        state = optimizer.init(params)
        ```

    **Arguments:**

    - `optimizer`: Any Optax optimizer with a learning rate, or a chain.
    - `ratio`: How many times as large the learning rate of this factor is. The paper
        advises about 16 for harder tasks, with a smaller learning rate than LoRA's.

    **Returns:**

    An Optax optimizer for the `params` of `lorax.partition`. In
    `lorax.wrap_optimizer(lorax.lora_plus(...), spec)` it is for the parameters of
    `lorax.init_lora`.

    **Raises:**

    `ValueError` if `ratio` is not a positive number; and by `init`, if no weight has
    such a factor.

    ??? cite

        [LoRA+: Efficient Low Rank Adaptation of Large
        Models](https://arxiv.org/abs/2402.12354), section 4.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(
            f"`ratio={ratio}` has to be a positive number: it multiplies a learning "
            "rate. Pass 1 for plain LoRA, or 16 as in the paper."
        )
    inner = prepare(optimizer)

    def init(params: PyTree) -> Any:
        found = []
        map_weights_with_outputs(
            lambda weight, outputs: found.extend(list_output_factors(weight, outputs)),
            params,
        )
        if not found:
            raise no_adapters("no trained factors on an output side", _FIX)
        return inner.init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        updates, state = inner.update(updates, state, params, **extra)
        return map_weights_with_outputs(speed_up, updates), state

    def speed_up(weight: AbstractLoraWeight, outputs: Side) -> AbstractLoraWeight:
        changed = {
            name: jax.tree.map(_times(ratio), getattr(weight, name))
            for name in list_output_factors(weight, outputs)
        }
        return weight.with_base(weight.w, **changed)

    return optax.GradientTransformationExtraArgs(init, update)


_FIX = (
    "Pass the `params` of `lorax.partition(model)`, of a model with adapters that have "
    "two trained factors, as those of LoRA; or use `optimizer` alone."
)


def _times(ratio: int | float) -> Any:
    return lambda x: multiply(x, ratio).astype(x.dtype) if is_inexact(x) else x
