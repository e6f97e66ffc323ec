"""A program as users write it. In strict mode Pyright has nothing to say against it. It
finds each mistake that a comment expects, and where it finds none, the comment is one.

`tests/project/test_user.py` runs it, and the gate checks its types.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_type, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax  # pyright: ignore[reportMissingTypeStubs]
from jaxtyping import Array, Float, PRNGKeyArray

import eqx_lorax as lorax


class Block(eqx.Module):
    query: eqx.nn.Linear
    value: eqx.nn.Linear

    def __init__(self, size: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.query = eqx.nn.Linear(size, size, key=keys[0])
        self.value = eqx.nn.Linear(size, size, key=keys[1])

    def __call__(self, x: Float[Array, " size"]) -> Float[Array, " size"]:
        return x + self.value(jnp.tanh(self.query(x)))


class Model(eqx.Module):
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, size: int, *, key: PRNGKeyArray):
        *keys, head_key = jax.random.split(key, 3)
        self.blocks = [Block(size, key=k) for k in keys]
        self.head = eqx.nn.Linear(size, 2, key=head_key)

    def __call__(self, x: Float[Array, " size"]) -> Float[Array, " 2"]:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Batch = tuple[Float[Array, "batch size"], Float[Array, " batch"]]


def loss(model: Model, batch: Batch) -> Float[Array, ""]:
    x, y = batch
    return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)


def make(key: PRNGKeyArray) -> tuple[Model, Batch]:
    x, y = jax.random.normal(key, (2, 64)), jax.random.normal(key, (2,))
    return Model(64, key=key), (x, y)


def is_wide(module: Any) -> bool:
    return isinstance(module, eqx.nn.Linear) and module.out_features == 64


def adapt(key: PRNGKeyArray) -> Model:
    """Each kind of filter, and options for all targets or for some."""
    model, _ = make(key)
    filters: list[lorax.Filter] = [
        None,
        "query",
        "blocks.*.query",
        ["query", "value"],
        re.compile(r"blocks\.\d\.value"),
        eqx.nn.Linear,
        is_wide,
    ]
    for filter in filters:
        assert_type(lorax.loraify(model, filter, rank=2, key=key), Model)
    ranks: Mapping[lorax.Pattern, int] = {"query": 2, re.compile(".*value"): 4}
    model = lorax.loraify(
        model,
        exclude="head",
        rank=ranks,
        alpha=4,
        dropout={"query": 0.0},
        method={"query": "lora", "*": lorax.LoraWeight},
        init="orthogonal",
        dtype=jnp.float32,
        key=key,
    )
    assert_type(model, Model)
    assert_type(lorax.dropout_key(model, key), Model)
    assert_type(lorax.unloraify(model), Model)
    return model


def optimizers(key: PRNGKeyArray) -> list[optax.GradientTransformationExtraArgs]:
    model = lorax.loraify(make(key)[0], method="lora_fa", rank=2, key=key)
    return [
        lorax.lora_plus(optax.adamw(1e-3), ratio=8),
        lorax.lora_pro(optax.sgd(1e-2)),
        lorax.lora_fa(optax.adam(1e-3), model),
        lorax.adalora(
            optax.adam(1e-3),
            target_rank=1,
            total_steps=9,
            warmup_steps=2,
            final_steps=2,
        ),
    ]


def train(model: Model, batch: Batch) -> Model:
    """The usual loop, with gradients of `params`, and with those of a whole model."""
    params, frozen = lorax.partition(model, also="head")
    assert_type(params, Model)
    optimizer = lorax.lora_plus(optax.adamw(1e-3), ratio=8)
    state = optimizer.init(cast(Any, params))

    @eqx.filter_jit
    def step(
        params: Model, frozen: Model, state: optax.OptState, batch: Batch
    ) -> tuple[Model, optax.OptState, Array]:
        def of_params(params: Model) -> Array:
            model = assert_type(lorax.combine(params, frozen), Model)
            return loss(model, batch)

        # What Equinox and Optax have no types for, users have to say themselves.
        value, grads = cast(Any, eqx).filter_value_and_grad(of_params)(params)
        updates, state = optimizer.update(grads, state, cast(Any, params))
        return cast(Any, eqx).apply_updates(params, updates), state, value

    params, state, value = step(params, frozen, state, batch)
    assert value.shape == ()
    model = lorax.combine(params, frozen)
    whole: Model = lorax.filter_grad(loss, exclude="value")(model, batch)
    also: Model = lorax.filter_grad(also="head")(loss)(model, batch)

    @lorax.filter_value_and_grad(has_aux=True)
    def with_prediction(model: Model, x: Array) -> tuple[Array, Array]:
        return jnp.sum(model(x)), model(x)

    (value, prediction), grads = with_prediction(model, batch[0][0])
    assert_type(prediction, Array)
    assert_type(value, Array)
    assert len(whole.blocks) == len(also.blocks) == len(grads.blocks)
    policy: Callable[..., bool] = lorax.checkpoint_policy()
    cast(Any, jax).checkpoint(loss, policy=policy)
    return assert_type(lorax.merged_forward(model, "query"), Model)


def look(model: Model, batch: Batch) -> None:
    summary = assert_type(lorax.summary(model), lorax.Summary)
    first = summary.targets[0]
    assert_type(first.rank, int | None)
    assert_type(first.shape, tuple[int, ...])
    assert_type(summary.table(full=True), str)
    spectra = lorax.spectra(model)
    assert_type(spectra.targets[0].values, tuple[float, ...])
    assert_type(lorax.allocate_ranks(spectra, threshold=0.9), dict[str, int])
    plan = assert_type(lorax.plan(loss, model, batch), lorax.Plan)
    assert_type(plan.table(), str)
    info = assert_type(lorax.info(model), lorax.Info)
    assert_type(info.versions["jax"], str)


def save(model: Model, folder: Path) -> Model:
    lorax.save_adapter(folder / "adapter.safetensors", model, metadata={"epoch": 1})
    info = lorax.adapter_info(folder / "adapter.safetensors")
    assert_type(info, dict[str, Any])
    plain = lorax.unloraify(model, merge=False)
    model = lorax.load_adapter(folder / "adapter.safetensors", plain)
    lorax.peft.save(folder / "peft", model, names=lambda path: path)
    names: lorax.peft.Names = {"blocks.*.query": "layers.{}.query"}
    lorax.peft.save(str(folder / "peft_layers"), model, names=names)
    model = lorax.peft.load(folder / "peft", plain, names=lambda path: path)
    return assert_type(model, Model)


def share(model: Model) -> Model:
    """Several adapters, and a quantised base."""
    adapter, _ = lorax.partition(model)
    stacked: Model = lorax.stack([adapter, lorax.scale(adapter, 0.5)])
    assert len(stacked.blocks) == 2
    both = lorax.weighted_sum([adapter, adapter], [0.5, 0.5])
    assert_type(both, Model)
    pruned, errors = lorax.weighted_sum(
        [adapter, adapter], [0.5, 0.5], "ties", rank=2, density=0.5, return_error=True
    )
    assert_type(pruned, Model)
    assert_type(errors, dict[str, Array])
    model = lorax.attach(lorax.unloraify(model), both)
    small = assert_type(lorax.quantise(model, format="int8"), Model)
    error = assert_type(lorax.quantisation_error(small, model), lorax.QuantisationError)
    assert_type(error.worst, float)
    return assert_type(lorax.dequantise(small), Model)


Params = dict[str, Array]


def apply(params: Params, x: Array) -> Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def functions(key: PRNGKeyArray) -> Array:
    """The function door, with the interface of jax-lorax."""
    params: Params = {
        "w": jax.random.normal(key, (8, 8)),
        "v": jax.random.normal(key, (8, 2)),
    }

    def decide(path: lorax.KeyPath, x: Any) -> lorax.SpecValue:
        return 2 if "w" in str(path) else lorax.LORA_FREEZE

    spec = lorax.simple_spec(params, decide)
    adapted: Params = lorax.init_lora(params, spec, key)
    x = jax.random.normal(key, (3, 8))
    y = assert_type(lorax.lora(apply)(adapted, x), Array)
    optimizer = lorax.wrap_optimizer(optax.adam(1e-3), spec)
    state: optax.OptState = optimizer.init(adapted)
    assert state is not None
    trained, frozen = lorax.partition(adapted)
    assert_type(lorax.combine(trained, frozen), Params)
    merged: Params = lorax.merge_params(adapted, destructive=False)
    return y + apply(merged, x)


def mistakes(model: Model, key: PRNGKeyArray) -> None:
    """Pyright finds each of these. Nothing runs it."""
    lorax.loraify(model)  # pyright: ignore[reportCallIssue]
    lorax.loraify(model, rank="8", key=key)  # pyright: ignore[reportArgumentType]
    lorax.loraify(model, dropout="no", key=key)  # pyright: ignore[reportArgumentType]
    lorax.unloraify(model, merged=True)  # pyright: ignore[reportCallIssue]
    lorax.summary(model).tragets  # pyright: ignore
    lorax.lora(apply)("x", 1)  # pyright: ignore[reportArgumentType]
    lorax.lora_plus(1e-3)  # pyright: ignore[reportArgumentType]
    lorax.peft.save("folder", model)  # pyright: ignore[reportCallIssue]
    text: str = lorax.partition(model)  # pyright: ignore[reportAssignmentType]
    text = lorax.quantise(model)  # pyright: ignore[reportAssignmentType]
    text = lorax.load_adapter("a", model)  # pyright: ignore[reportAssignmentType]
    print(text)


def main(folder: Path) -> None:
    key = jax.random.key(0)
    _, batch = make(key)
    assert len(optimizers(key)) == 4
    model = train(adapt(key), batch)
    look(model, batch)
    share(model)
    functions(key)
    save(lorax.loraify(make(key)[0], "query", rank=2, key=key), folder)
