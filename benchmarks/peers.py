"""LoRA of other libraries, on a stack of linear layers with ReLUs. Each function raises
`ImportError` if its library is not installed."""

# They are optional: type checks must pass without them.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from harness import Program
from steps import step


Pair = tuple[Program, Program]
"""The floor and the step."""


def _nnx_programs(name: str, module: Any, lora_type: type, x: Any) -> Program:
    from flax import nnx

    graph, trained, rest = nnx.split(module, lora_type, ...)

    def forward(params: Any, x: Any) -> Any:
        return nnx.merge(graph, *params)(x)

    is_trained = (
        jax.tree.map(lambda _: True, trained),
        jax.tree.map(lambda _: False, rest),
    )
    return step(name, forward, (trained, rest), is_trained, x)


def _nnx_stack(layers: int, make: Callable[..., Any], x: Any, **options: Any) -> Any:
    from flax import nnx

    class Stack(nnx.Module):
        def __init__(self):
            options.update(use_bias=False, dtype=x.dtype, param_dtype=x.dtype)
            sizes, rngs = (x.shape[-1], x.shape[-1]), nnx.Rngs(0)
            each = [make(*sizes, rngs=rngs, **options) for _ in range(layers)]
            self.layers = nnx.List(each)

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = jax.nn.relu(layer(x))
            return x

    return Stack()


def nnx_lora(layers: int, x: Any, rank: int) -> Program:
    from flax import nnx

    options: dict[str, Any] = dict(lora_rank=rank, lora_dtype=x.dtype)
    model = _nnx_stack(layers, nnx.LoRALinear, x, **options)
    return _nnx_programs("flax.nnx.LoRALinear", model, nnx.LoRAParam, x)


def qwix_lora(layers: int, x: Any, rank: int, **options: Any) -> Program:
    """With `weight_qtype="nf4", tile_size=64` it is QLoRA."""
    import qwix
    from flax import nnx

    rule: dict[str, Any] = dict(module_path=".*", rank=rank, alpha=rank, **options)
    provider = qwix.LoraProvider(**rule)
    model = _nnx_stack(layers, nnx.Linear, x)
    model = qwix.apply_lora_to_model(model, provider, x[:2], rngs=nnx.Rngs(1))
    name = " ".join(["qwix on nnx", *options.get("weight_qtype", "").split()])
    return _nnx_programs(name, model, nnx.LoRAParam, x)


def quax_lora(model: Any, x: Any, rank: int) -> Program:
    import quax
    from quax.examples.lora import LoraArray, loraify

    adapted = loraify(model, rank=rank, key=jr.key(0))
    is_lora = lambda node: isinstance(node, LoraArray)  # noqa: E731

    def is_trained(node: Any) -> Any:
        spec = jax.tree.map(lambda _: False, node)
        return (
            eqx.tree_at(lambda n: (n.a, n.b), spec, (True, True))
            if is_lora(node)
            else spec
        )

    def forward(model: Any, x: Any) -> Any:
        return jax.vmap(quax.quaxify(model))(x)

    trained = jax.tree.map(is_trained, adapted, is_leaf=is_lora)
    return step("quax", forward, adapted, trained, x)


def equimo_lora(model: Any, x: Any, rank: int) -> Program:
    """Needs Python 3.12 or newer."""
    from equimo.finetune import TargetSpec
    from equimo.finetune.peft.lora import apply_lora, LoRAConfig

    every = TargetSpec(predicate=lambda *_: True)
    config = LoRAConfig(rank=rank, alpha=rank, target=every)
    adapted = apply_lora(model, config, key=jr.key(0))

    def is_factor(path: Any, _: Any) -> bool:
        return path[-1].name in ("lora_A", "lora_B")

    trained = jax.tree_util.tree_map_with_path(is_factor, adapted)
    forward = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    return step("equimo.finetune", forward, adapted, trained, x)


def peft_lora(layers: int, x: Any, rank: int, **options: Any) -> Pair:
    """Has its own floor, in PyTorch, on the device of JAX and with the precision of
    JAX."""
    import peft
    import torch

    is_on_gpu = jax.default_backend() == "gpu"
    device = torch.device("cuda" if is_on_gpu else "cpu")
    torch.set_float32_matmul_precision("high" if is_on_gpu else "highest")

    width = x.shape[-1]

    def make() -> Any:
        torch.manual_seed(0)
        parts: list[Any] = []
        for _ in range(layers):
            parts += [torch.nn.Linear(width, width, bias=False), torch.nn.ReLU()]
        return torch.nn.Sequential(*parts).to(device, dtype)

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[x.dtype.name]
    inputs = torch.from_numpy(np.array(x.astype(jnp.float32))).to(device, dtype)
    inputs.requires_grad_(True)
    plain = make().requires_grad_(False)
    names = [str(2 * i) for i in range(layers)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, **options)
    adapted = peft.get_peft_model(make(), config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)

    def backward(model: Any) -> None:
        inputs.grad = None
        model(inputs).float().square().mean().backward()

    def update() -> None:
        optimizer.zero_grad()
        backward(adapted)
        optimizer.step()

    def finish(_: Any) -> None:
        if is_on_gpu:
            torch.cuda.synchronize()

    floor = Program("PyTorch, frozen", lambda: backward(plain), finish)
    return floor, Program("PEFT on PyTorch", update, finish)
