"""AdaLoRA beside the real PEFT."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from helpers import assert_close, wide
from peft_helpers import AGAINST_PEFT
from steps import arrays_like, take_steps

import eqx_lorax as lorax


pytestmark = AGAINST_PEFT

STEPS = dict(total_steps=12, warmup_steps=2, final_steps=4, interval=3)
RATE = 0.1


def test_the_same_triplets_are_pruned():
    """The same gradients in, the same triplets out, if PEFT computes importance from
    the parameters at which the gradient was taken, as in the paper. Its documentation
    has it called after the step."""
    import peft
    import torch

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7))
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=STEPS["warmup_steps"],
        tfinal=STEPS["final_steps"],
        deltaT=STEPS["interval"],
        total_step=STEPS["total_steps"],
        target_modules=["0", "1"],
    )
    base: Any = peft.get_peft_model(layers, config).base_model
    allocator, modules = base.rankallocator, [base.model[0], base.model[1]]
    names = {"b": "lora_B", "a": "lora_A", "gate": "lora_E"}

    def read(module, field):
        return jnp.array(getattr(module, names[field])["default"].detach().numpy())

    params = [
        lorax.AdaLoraWeight(
            None, read(m, "b"), read(m, "a"), jnp.ones(4) * (i + 1), alpha=1.0
        )
        for i, m in enumerate(modules)
    ]
    random = np.random.default_rng(0)
    gradients = [arrays_like(params, seed) for seed in random.integers(0, 999, 12)]
    optimizer = lorax.adalora(optax.sgd(RATE), target_rank=2, **STEPS)
    found = take_steps(optimizer, params, gradients)
    for i, module in enumerate(modules):
        module.lora_E["default"].data.fill_(float(i + 1))
    last, pattern = STEPS["total_steps"] - STEPS["final_steps"], None
    for step, (gradient, ours) in enumerate(zip(gradients, found), 1):
        arrays = []
        for module, g in zip(modules, gradient):
            for field, name in names.items():
                array = getattr(module, name)["default"]
                new = torch.tensor(np.asarray(getattr(g, field)))
                array.grad = new.reshape(array.shape)
                arrays.append(array)
        if step < last:
            allocator.update_ipt(base.model)
        with torch.no_grad():
            for array in arrays:
                array -= RATE * array.grad
        budget, is_pruned = allocator.budget_schedule(step)
        if step > last:
            allocator.mask_using_rank_pattern(base.model, pattern)
        elif is_pruned or step == last:
            pattern = allocator.mask_to_budget(base.model, budget)
        for module, weight in zip(modules, ours):
            theirs = wide(read(module, "gate"))[:, 0]
            assert_close(weight.gate, theirs)
            assert np.array_equal(np.asarray(weight.gate) == 0, theirs == 0)
    assert pattern is not None and sum(map(sum, pattern.values())) == 4
