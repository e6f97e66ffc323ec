"""Fine-tune MiniLM in several processes, each with several devices, and resume after
any of them was killed.

Batches are sharded over one axis of a mesh, and the matrices of the model over the
other. The layers are stacked, scanned and recomputed in the backward pass, and
gradients are added up over parts of a batch. A checkpoint is saved every few steps. Run
the same command again to resume from the last one: the losses are those of an unbroken
run.
"""

import launch


if __name__ == "__main__":
    # Before the slow imports, which the launching process does not need.
    launch.start(__file__)

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PyTree

import eqx_lorax as lorax
import minilm
import toolbox
from sentiment import Classifier, load_reviews, loss, Reviews


@dataclasses.dataclass(frozen=True)
class Result:
    losses: list[float]
    accuracy: float
    resumed_from: int
    adapter: Path


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    _check_flags(parser, args)
    if args.cluster:
        # SLURM and others give the number of this process in the environment.
        jax.distributed.initialize()
    elif args.process is not None:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    return run(args, parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Result:
    """Runs in each of the processes."""
    if args.mesh[0] * args.mesh[1] != jax.device_count():
        parser.error(f"--mesh must be of all {jax.device_count()} devices")
    mesh = jax.make_mesh(
        args.mesh, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
    )
    tell(f"{jax.process_count()} processes, {jax.device_count()} devices as {mesh}")
    head_key, adapter_key = jr.split(jr.key(args.seed))
    bert, train_reviews, test_reviews = tiny(args) if args.tiny else real(args, parser)
    plain = put(stacked(Classifier(bert, key=head_key)), mesh)
    model = lorax.loraify(plain, args.targets, rank=args.rank, key=adapter_key)
    tell(lorax.summary(model, also="head"))

    params, frozen = lorax.partition(model, also="head")
    try:
        params, losses, first = train(params, frozen, train_reviews, mesh, args)
    except lorax.AdapterFileError as error:
        parser.error(str(error))
    model = lorax.combine(params, frozen)
    correct = accuracy(model, test_reviews, mesh, args)
    tell(f"Held-out accuracy  {correct:.3f}  ({len(test_reviews.labels):,} reviews)")
    adapter = args.output / "distributed.safetensors"
    lorax.save_adapter(adapter, model, also="head")
    tell(f"Adapter and head   {adapter}")
    if jax.process_index() == 0:
        np.save(args.output / "distributed_losses.npy", np.array(losses, np.float32))
        if not args.tiny:
            picture = draw(losses, first, correct, args.output)
            tell(f"Loss curve         {picture}")
    return Result(losses, correct, first, adapter)


def tell(what: object) -> None:
    if jax.process_index() == 0:
        print(what, flush=True)


# Model


class ScannedEncoder(eqx.Module):
    """The layers of an encoder, stacked: each array has a leading axis for the
    layers."""

    layers: minilm.Layer

    def __call__(
        self, x: Float[Array, "seq hidden"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "seq hidden"]:
        arrays, rest = eqx.partition(self.layers, eqx.is_array)

        # Only the input of each layer is kept for the backward pass.
        @jax.checkpoint
        def apply(x: Array, arrays: PyTree) -> tuple[Array, None]:
            return eqx.combine(arrays, rest)(x, mask), None

        return jax.lax.scan(apply, x, arrays)[0]


def stacked(model: Classifier) -> Classifier:
    layers = jax.tree.map(lambda *x: np.stack(x), *model.bert.encoder.layers)
    return eqx.tree_at(lambda m: m.bert.encoder, model, ScannedEncoder(layers))


# The first matrices of a block are split over `model` by rows and the last ones by
# columns, so that no communication is needed in between.
SPLIT = {
    ("query", "weight"): P(None, "model", None),
    ("key", "weight"): P(None, "model", None),
    ("value", "weight"): P(None, "model", None),
    ("intermediate", "weight"): P(None, "model", None),
    ("query", "bias"): P(None, "model"),
    ("key", "bias"): P(None, "model"),
    ("value", "bias"): P(None, "model"),
    ("intermediate", "bias"): P(None, "model"),
    ("output", "weight"): P(None, None, "model"),
}


def put(model: PyTree, mesh: Mesh) -> PyTree:
    """Puts the model on the mesh. It is adapted afterwards, so factors are sharded to
    match."""

    def place(path: Any, x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        spec = SPLIT.get((names[-2], names[-1]), P())
        return spread(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, model)


def spread(x: Any, sharding: NamedSharding) -> Array:
    """Puts `x`, which all processes have, on the devices of all of them."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


# Data


def real(
    args: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[minilm.Bert, Reviews, Reviews]:
    return minilm.load_minilm(), *load_reviews(args, parser)


def tiny(args: argparse.Namespace) -> tuple[minilm.Bert, Reviews, Reviews]:
    """A small random model for a quick check. Texts are positive if they begin with a
    word from the first half of the vocabulary."""
    config = minilm.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        type_vocab_size=1,
        layer_norm_eps=1e-12,
    )
    random = np.random.default_rng(args.seed)
    shapes = eqx.filter_eval_shape(minilm.Bert, config, key=jr.key(0))
    bert = jax.tree.map(
        lambda x: 0.2 * random.normal(size=x.shape).astype(np.float32), shapes
    )

    def reviews(count: int) -> Reviews:
        tokens = random.integers(0, 64, (count, 8))
        labels = (tokens[:, 0] < 32).astype(np.int32)
        mask = np.ones(tokens.shape, bool)
        return Reviews(*map(jnp.asarray, (tokens, mask, labels)))

    return bert, reviews(args.train_rows), reviews(args.test_rows)


def rows_of(step: int, count: int, size: int, seed: int) -> Int[np.ndarray, " row"]:
    """The rows that step number `step` trains on. They depend on the number alone, so
    that a resumed run gets the same rows as an unbroken one."""
    epoch, place = divmod(step, count // size)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return order[place * size : (place + 1) * size]


# Training


@eqx.filter_jit(donate="all-except-first")
def step(
    constant: tuple[PyTree, optax.GradientTransformation, Reviews],
    params: PyTree,
    optimizer_state: PyTree,
    losses: Float[Array, " step"],
    number: Int[Array, ""],
) -> tuple[PyTree, PyTree, Float[Array, " step"], Float[Array, ""]]:
    """One step, on a batch with a leading axis for its parts."""
    frozen, optimizer, parts = constant

    def add(total: PyTree, part: Reviews) -> tuple[PyTree, None]:
        found = eqx.filter_value_and_grad(loss)(params, frozen, part)
        return jax.tree.map(jnp.add, total, found), None

    none = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, none, parts)
    value, gradient = jax.tree.map(lambda x: x / len(parts.labels), total)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
    params = eqx.apply_updates(params, updates)
    return params, optimizer_state, losses.at[number].set(value), value


def train(
    params: PyTree, frozen: PyTree, reviews: Reviews, mesh: Mesh, args: Any
) -> tuple[PyTree, list[float], int]:
    """Returns the trained `params`, the loss of each step, and the number of the first
    step."""
    replicated = NamedSharding(mesh, P())
    in_parts = NamedSharding(mesh, P(None, "data"))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, args.steps // 10, args.steps
    )
    optimizer = optax.adamw(schedule)
    state = params, optimizer.init(params), jnp.zeros(args.steps)
    # Counters and the like are on the first device of each process.
    state = jax.tree.map(lambda x: x if x.committed else spread(x, replicated), state)

    def batch(number: int) -> Reviews:
        rows = rows_of(number, len(reviews.labels), args.batch_size, args.seed)
        rows = rows.reshape(args.accumulate, -1)
        return Reviews(*(spread(np.asarray(x)[rows], in_parts) for x in reviews))

    folder = args.output / "checkpoints"
    with lorax.Checkpoints(folder, frozen, every=args.every) as checkpoints:
        first, state = checkpoints.restore(state) or (0, state)
        if first:
            tell(f"Going on from the checkpoint of step {first:,}")
        with contextlib.closing(Progress(first, args)) as progress:
            for number in range(first, args.steps):
                params, optimizer_state, losses = state
                constant = frozen, optimizer, batch(number)
                index = spread(np.int32(number), replicated)
                *state, value = step(constant, params, optimizer_state, losses, index)
                progress(float(value))
                is_last = number + 1 == args.steps
                checkpoints.save(number + 1, tuple(state), force=is_last)
    params, _, losses = state
    return params, np.asarray(losses).tolist(), first


class Progress:
    """A progress bar, or lines if the output is not a terminal, from the first process
    only."""

    def __init__(self, first: int, args: argparse.Namespace):
        self._done, self._every, self._bar = first, args.every, None
        if jax.process_index() == 0 and sys.stderr.isatty():
            with toolbox.install_hint():
                from tqdm import tqdm
            self._bar = tqdm(
                total=args.steps, initial=first, desc="Training", unit="step"
            )

    def __call__(self, value: float) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            self._bar.update()
        elif self._done % self._every == 0:
            tell(f"Step {self._done:,}: loss {value:.3f}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


# Evaluation


@eqx.filter_jit
def count_correct(model: Classifier, batch: Reviews) -> Int[Array, ""]:
    logits = jax.vmap(model)(batch.tokens, batch.mask)
    return jnp.sum(logits.argmax(1) == batch.labels)


def accuracy(
    model: Classifier, reviews: Reviews, mesh: Mesh, args: argparse.Namespace
) -> float:
    over_data = NamedSharding(mesh, P("data"))
    size = args.batch_size
    correct = 0
    for start in range(0, len(reviews.labels), size):
        part = [np.asarray(x)[start : start + size] for x in reviews]
        missing = size - len(part[0])
        # Padded with a label that does not occur.
        part = [
            np.concatenate([x, np.full((missing, *x.shape[1:]), -1, x.dtype)])
            for x in part
        ]
        part = Reviews(*(spread(x, over_data) for x in part))
        correct += int(count_correct(model, part))
    return correct / len(reviews.labels)


def draw(losses: Sequence[float], first: int, correct: float, folder: Path) -> Path:
    with toolbox.install_hint():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    toolbox.plot_losses(axes, losses)
    if first:
        axes.axvline(first, color="tab:orange", linestyle="--", linewidth=1)
    figure.suptitle("MiniLM on a mesh of devices", fontweight="bold")
    axes.set_title(f"Held-out accuracy {correct:.1%}", fontsize=10)
    file = folder / "distributed.png"
    toolbox.save_figure(figure, file)
    return file


# Flags


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    parser.add_training_flags(steps=350, rank=8, batch_size=16, learning_rate=3e-3)
    parser.add_argument(
        "--mesh",
        type=_mesh,
        default=(4, 2),
        metavar="DATAxMODEL",
        help="devices along each of the two axes",
    )
    parser.add_argument(
        "--targets", nargs="+", default=["query", "value"], metavar="PATTERN"
    )
    parser.add_sizes(
        ("--accumulate", 2, "parts of a batch, one after the other"),
        ("--every", 25, "steps from one checkpoint to the next"),
        ("--length", 40, "tokens to which reviews are cut and padded"),
        ("--train-rows", 7000, "reviews to train on"),
        ("--test-rows", 1024, "reviews to hold out"),
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="this is one of the processes that SLURM, Kubernetes or others start",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a small random model on made-up texts"
    )
    launch.add_flags(parser)
    return parser


def _mesh(text: str) -> tuple[int, int]:
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"must be like 4x2, not {text}")
    return int(sizes[0]), int(sizes[1])


def _check_flags(parser: toolbox.Parser, args: argparse.Namespace) -> None:
    parser.check_batch_size(args.batch_size, args.train_rows)
    if args.batch_size % (args.accumulate * args.mesh[0]):
        parser.error("--batch-size must be a multiple of --accumulate × DATA of --mesh")
    if args.train_rows % 2 or args.test_rows % 2:
        parser.error("--train-rows and --test-rows must be even: half are positive")


if __name__ == "__main__":
    main()
