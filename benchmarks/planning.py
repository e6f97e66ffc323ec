"""Compares plans with the real arrays and the compiled program.

    python benchmarks/planning.py [--small] [--devices 8]

The models are small Llamas in float32, scanned with checkpointed layers, and unrolled.
Prints ratios of `lorax.plan` to measurements: the bytes on one device to those of the
real arrays and to the temporary memory of the compiled training step, and the FLOPs to
XLA's count. With `--devices 8` the CPU acts as eight devices, in a mesh of
data × model.
"""

import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from harness import flag_parser, use_virtual_devices
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import eqx_lorax as lorax


sys.path.append(str(Path(__file__).parent.parent / "examples"))

import toolbox  # noqa: E402
from plan_llama import Config, divided, Llama, loss  # noqa: E402


CONFIGS = {
    "5M": Config(256, 4, 4, 4, 512, 4000),
    "26M": Config(512, 6, 8, 2, 1536, 8000),
    "123M": Config(1024, 8, 16, 4, 2816, 16_000),
    "400M": Config(1536, 12, 24, 8, 4096, 32_000),
}
RANK, TOKENS = 8, 512


class Unrolled(eqx.Module):
    """A Llama whose layers are a list."""

    llama: Llama
    blocks: list[Any]
    is_checkpointed: bool = eqx.field(static=True)

    def __init__(self, llama: Llama, layers: int, is_checkpointed: bool):
        stack = llama.blocks
        self.blocks = [
            jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, stack)
            for i in range(layers)
        ]
        self.llama = eqx.tree_at(lambda llama: llama.blocks, llama, None)
        self.is_checkpointed = is_checkpointed

    def __call__(self, tokens: Any) -> Any:
        x = jax.vmap(self.llama.words)(tokens)
        for block in self.blocks:
            call = eqx.filter_checkpoint(block) if self.is_checkpointed else block
            x = call(x)
        assert self.llama.head is not None
        return jax.vmap(self.llama.head)(jax.vmap(self.llama.norm)(x))


class Constrained(eqx.Module):
    """Constrains the inputs and outputs of blocks to have the full width on each
    device. Without this, XLA sometimes gathers the examples instead of the weights."""

    blocks: Any
    sharding: NamedSharding = eqx.field(static=True)

    def __call__(self, x: Any) -> Any:
        x = jax.lax.with_sharding_constraint(x, self.sharding)
        return jax.lax.with_sharding_constraint(self.blocks(x), self.sharding)


def constrained_loss(model: Any, tokens: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec())
    blocks = Constrained(model.blocks, sharding)
    model = eqx.tree_at(lambda model: model.blocks, model, blocks)
    logits = jax.vmap(model, spmd_axis_name="data")(tokens)
    return toolbox.next_token_loss(logits, tokens)


def adapted(config: Config, form: str, mesh: Mesh | None) -> Any:
    """The real model, with its base on the mesh and the adapters sharded to match."""
    make = lambda: Llama(config, jnp.dtype("float32"), key=jr.key(0))  # noqa: E731
    if mesh is None:
        model: Any = eqx.filter_jit(make)()
        if form != "scanned":
            model = Unrolled(model, config.layers, form == "unrolled, checkpoint")
    else:
        shapes = divided(eqx.filter_eval_shape(make), mesh)
        shardings = jax.tree.map(lambda x: x.sharding, shapes)
        model = jax.jit(make, out_shardings=shardings)()
    return lorax.loraify(model, "blocks", rank=RANK, key=jr.key(1))


def on_one_device(tree: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def compare(name: str, form: str, mesh: Mesh | None, batch: int) -> None:
    model = adapted(CONFIGS[name], form, mesh)
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
    tokens = jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32, sharding=sharding)
    params, frozen = lorax.partition(model)
    optimizer = optax.adam(1e-3)
    plan = lorax.plan(loss, model, tokens, optimizer=optimizer)

    def step(params: Any, frozen: Any, state: Any, tokens: Any) -> Any:
        def of_params(params: Any) -> Any:
            model = eqx.combine(params, frozen)
            return (
                loss(model, tokens)
                if mesh is None
                else constrained_loss(model, tokens, mesh)
            )

        value, gradient = jax.value_and_grad(of_params)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    jitted = jax.jit(step, donate_argnums=(0, 2))
    compiled = jitted.lower(params, frozen, state, tokens).compile()
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    held = [on_one_device(tree) for tree in (frozen, params, state)]
    exact = [plan.base, plan.adapters, plan.optimizer]
    temporary = memory.temp_size_in_bytes
    planned = plan.activations + plan.gradients
    ratios = "".join(f"{x / y:>9.3f}" for x, y in zip(exact, held))
    # XLA counts a loop as one iteration.
    flops = "" if form == "scanned" else f"{plan.flops / cost['flops']:.3f}"
    print(
        f"{name:<6}{form:<21}{ratios}{planned / 1e6:>9.1f}{temporary / 1e6:>10.1f}"
        f"{planned / temporary:>7.2f}{flops:>8}",
        flush=True,
    )


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--devices", type=int, default=1, choices=[1, 2, 4, 8])
    parser.add_argument("--small", action="store_true", help="the smallest alone")
    flags = parser.parse_args()
    if flags.devices > 1:
        use_virtual_devices(flags.devices)
    shapes = {1: None, 2: (2, 1), 4: (2, 2), 8: (4, 2)}
    shape = shapes[flags.devices]
    meshes: list[Mesh | None] = [None]
    if shape is not None:
        auto = (AxisType.Auto,) * 2
        devices = np.array(jax.devices())
        meshes = [
            Mesh(devices.reshape(shape), ("data", "model"), axis_types=auto)
            for shape in ((flags.devices, 1), shape)
        ]
    print(f"{'':<27}{'plan over real, one device':^27}{'MB of temporaries':^26}")
    print(
        f"{'model':<6}{'layers':<21}{'base':>9}{'adapters':>9}{'Adam':>9}{'plan':>9}"
        f"{'compiled':>10}{'ratio':>7}{'FLOPs':>8}"
    )
    names = list(CONFIGS)[:1] if flags.small else list(CONFIGS)
    for mesh in meshes:
        if mesh is not None:
            print(f"mesh {mesh.shape['data']} × {mesh.shape['model']}")
        batch = 2 if mesh is None else 2 * mesh.shape["data"]
        unrolled = ("unrolled", "unrolled, checkpoint")
        for name in names:
            for form in ("scanned", *unrolled) if mesh is None else ("scanned",):
                compare(name, form, mesh, batch)


if __name__ == "__main__":
    main()
