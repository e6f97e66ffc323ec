"""A small Llama on meshes of eight devices, sharded in all ways, for the tests with one
process and with several."""

import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from helpers import is_weight
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tiny_llama import Llama

import eqx_lorax as lorax


DATA, MODEL = "data", "model"

# The mesh axes of rows and columns for each layer, by name, as in Megatron.
_TENSOR = {
    **dict.fromkeys(["query", "key", "value", "gate", "up", "head"], (MODEL, None)),
    **dict.fromkeys(["output", "down", "words"], (None, MODEL)),
}


class Way(NamedTuple):
    """How a model and its batch are sharded."""

    mesh: tuple[int, int]
    rows: str | None = None
    """A mesh axis that shards the rows of all matrices as well."""
    is_tensor: bool = False
    layers: str | None = None
    """The mesh axis that shards the axis of the layers."""


WAYS = {
    "data": Way((8, 1)),
    "fully sharded": Way((8, 1), rows=DATA),
    "tensor": Way((1, 8), is_tensor=True),
    "mixed": Way((4, 2), is_tensor=True),
    "mixed and fully sharded": Way((4, 2), rows=DATA, is_tensor=True),
    "pipeline": Way((2, 4), layers=MODEL),
}


# Several processes train these too. All of them would take too long, since each process
# compiles again.
SOME_WAYS = {name: WAYS[name] for name in WAYS if name != "mixed and fully sharded"}


def make_mesh(way: Way, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(way.mesh, (DATA, MODEL), axis_types=(kind, kind))


def make_llama() -> Llama:
    # The size of keys and values is also divisible by eight.
    return Llama(64, 32, 64, 4, 8, 8, jr.key(0))


def spec_for(way: Way, path: str, ndim: int) -> P:
    """The `PartitionSpec` of the weight at a path such as `blocks.attention.query`."""
    is_matrix = path.endswith(".weight") and "norm" not in path
    if not is_matrix:
        return P()
    rows, columns = _TENSOR[path.split(".")[-2]] if way.is_tensor else (None, None)
    if way.rows is not None:
        rows = way.rows if rows is None else (way.rows, rows)
        if columns == rows:
            rows = None
    batch = (way.layers,) if ndim == 3 else ()
    return P(*batch, rows, columns)


def on_mesh(model, mesh, way):
    """`model` with each array sharded as in `way`."""

    def put(path, x):
        dotted = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = NamedSharding(mesh, spec_for(way, dotted, x.ndim))
        return jax.make_array_from_callback(
            x.shape, sharding, lambda index: np.asarray(x)[index]
        )

    return jax.tree_util.tree_map_with_path(put, model)


def batches(mesh=None):
    random = np.random.default_rng(0)
    while True:
        tokens = random.integers(0, 64, (8, 6)).astype(np.int32)
        if mesh is None:
            yield jnp.asarray(tokens)
        else:
            sharding = NamedSharding(mesh, P(DATA))
            yield jax.make_array_from_callback(
                tokens.shape, sharding, lambda index, tokens=tokens: tokens[index]
            )


def loss(params, frozen, tokens):
    logits = jax.vmap(eqx.combine(params, frozen))(tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    )
    return losses.mean()


OPTIMIZER = optax.adam(1e-2)


@eqx.filter_jit
def step(params, frozen, state, tokens):
    value, gradient = eqx.filter_value_and_grad(loss)(params, frozen, tokens)
    with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers.
        updates, state = OPTIMIZER.update(gradient, state, params)
    return eqx.apply_updates(params, updates), state, value


def adapted(model):
    """The adapted model, with both factors different from zero."""
    model = lorax.loraify(model, "blocks", rank=2, key=jr.key(1))
    return jax.tree.map(
        lambda x: eqx.tree_at(lambda w: w.b, x, x.b + 0.01) if is_weight(x) else x,
        model,
        is_leaf=is_weight,
    )


def train(model, steps, mesh=None):
    """The losses, and the trained factors by path."""
    params, frozen = lorax.partition(adapted(model))
    state = OPTIMIZER.init(params)
    losses = []
    for _, tokens in zip(range(steps), batches(mesh)):
        params, state, value = step(params, frozen, state, tokens)
        losses.append(float(value))
    return losses, eqx.combine(params, frozen)


COLLECTIVE = re.compile(
    r"= (\(?.*?\)?) (all-gather|all-reduce|all-to-all|collective-permute|"
    r"reduce-scatter|collective-broadcast)(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """The collective operations in the text of a partitioned program, with the shapes
    of their results on one device."""
    return [
        (kind, tuple(int(size) for size in shape.split(",") if size))
        for result, kind in COLLECTIVE.findall(program)
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    ]
