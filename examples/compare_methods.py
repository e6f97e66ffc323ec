"""Compare the methods on one task: MiniLM on film reviews, at about equal trained size.

Each method adapts the query and the value of the upper layers of MiniLM and trains a
new head, with as many numbers as LoRA of rank 4 as nearly as it can. What the frozen
lower layers make of each text is computed once for all of them. Beside them are the
head alone, biases alone, and full fine-tuning of the whole of MiniLM.

For each method the learning rate is the one of the lowest loss on validation rows, out
of the same grid for all. Then it is trained with several seeds, and only then are the
held-out rows looked at.

The result of each run is appended to a file as the run ends. Start it again after an
interruption, and it does what is missing there. So it does with more seeds, methods or
learning rates.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import eqx_lorax as lorax
import minilm
import toolbox
from sentiment import load_reviews, Reviews


with toolbox.install_hint():
    from matplotlib.figure import Figure
    from tqdm import tqdm


LEARNING_RATES = 1e-4, 5e-4, 2.5e-3, 1.25e-2, 6.25e-2
TARGETS = ["query", "value"]


# The model


class Texts(NamedTuple):
    """Tokens or what the lower layers make of them, where they are not padding, and 1
    for each positive text."""

    x: Array
    mask: Bool[Array, "text seq"]
    labels: Int[Array, " text"]


class Lower(eqx.Module):
    """The embeddings and the lower layers."""

    embeddings: minilm.Embeddings
    layers: minilm.Layer

    def __call__(
        self, tokens: Int[Array, " seq"], mask: Bool[Array, " seq"]
    ) -> Float[Array, "seq hidden"]:
        return scan(self.layers, self.embeddings(tokens), mask)


class Classifier(eqx.Module):
    """The upper layers and a new head, on top of the lower ones or on what these have
    returned."""

    lower: Lower | None
    layers: minilm.Layer
    head: eqx.nn.Linear

    def __call__(self, x: Array, mask: Bool[Array, " seq"]) -> Float[Array, "2"]:
        if self.lower is not None:
            x = self.lower(x, mask)
        return self.head(minilm.mean_pool(scan(self.layers, x, mask), mask))


def scan(
    layers: minilm.Layer, x: Float[Array, "seq hidden"], mask: Bool[Array, " seq"]
) -> Float[Array, "seq hidden"]:
    """One layer after the other. Their arrays are stacked: compiled once for all."""
    arrays, rest = eqx.partition(layers, eqx.is_array)
    apply = lambda x, arrays: (eqx.combine(arrays, rest)(x, mask), None)  # noqa: E731
    return jax.lax.scan(apply, x, arrays)[0]


def load_halves(upper: int) -> tuple[Lower, Callable[[PRNGKeyArray], Classifier]]:
    """The lower layers, and a function that makes a classifier of the `upper` ones."""
    bert = minilm.load_minilm()
    layers = bert.encoder.layers
    lower, upper_layers = (
        jax.tree.map(lambda *x: jnp.stack(x), *part)
        for part in (layers[:-upper], layers[-upper:])
    )
    size = bert.embeddings.words.embedding_size

    def make(key: PRNGKeyArray) -> Classifier:
        return Classifier(None, upper_layers, eqx.nn.Linear(size, 2, key=key))

    return Lower(bert.embeddings, lower), make


def loss(model: Classifier, batch: Texts) -> Float[Array, ""]:
    logits = jax.vmap(model)(batch.x, batch.mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


# The methods


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained, and how."""

    options: dict[str, Any] | None
    """The arguments for `lorax.loraify`; `None` for no adapters."""

    also: Any = "head"
    """What else is trained."""

    is_full: bool = False
    """Whether everything is trained, of the lower layers too."""

    wrap: Callable[[Any, int], Any] = lambda optimizer, steps: optimizer
    """What goes around Adam, for so many steps."""

    penalty: float = 0.0
    """The weight of `lorax.orthogonality` in the loss."""


def prune(optimizer: Any, steps: int) -> Any:
    """AdaLoRA's budget: from rank 6 down to 4 on average."""
    return lorax.adalora(
        optimizer,
        target_rank=4,
        total_steps=steps,
        warmup_steps=steps // 5,
        final_steps=steps // 3,
    )


def list_methods(model: Classifier, batches: Sequence[Texts]) -> dict[str, Method]:
    """`batches` are what starts from data see."""
    data = lorax.calibrate(loss, model, batches, TARGETS, rank=4, key=jr.key(0))
    # The options that give 8 · 384 numbers for each weight, where that is possible.
    options: dict[str, dict[str, Any]] = {
        "lora": dict(rank=4),
        "lora, stabilised": dict(rank=4, rank_stabilised=True),
        "lora, pissa": dict(rank=4, init="pissa"),
        "lora, olora": dict(rank=4, init="olora"),
        "lora, milora": dict(rank=4, init="milora"),
        "lora, eva": dict(rank=4, init=data.eva()),
        "lora, lora_ga": dict(rank=4, init=data.lora_ga()),
        "dora": dict(rank=4, method="dora"),
        "lora_fa": dict(rank=8, method="lora_fa"),
        "lora_xs": dict(rank=55, method="lora_xs"),
        "loha": dict(rank=2, method="loha"),
        "lokr": dict(rank=16, method="lokr", decompose_factor=4),
        "vera": dict(rank=256, method="vera"),
        "ia3": dict(method="ia3", scale_inputs=True),
    }
    methods = {
        "head alone": Method(None),
        "biases": Method(None, also=["head", "**.bias"]),
    }
    methods |= {name: Method(of_one) for name, of_one in options.items()}
    pruned = dict(rank=6, method="adalora")
    methods["adalora"] = Method(pruned, wrap=prune, penalty=0.1)
    return methods | {"full fine-tuning": Method(None, is_full=True)}


# Training


class Trainer:
    """A compiled step of one method, for any seed and learning rate."""

    def __init__(
        self,
        method: Method,
        make: Callable[[PRNGKeyArray], Classifier],
        lower: Lower,
        batch: Texts,
        steps: int,
    ):
        self.method, self.make, self.lower, self.steps = method, make, lower, steps
        params, arrays, self.static = self.start(0)
        self.trained = sum(leaf.size for leaf in jax.tree.leaves(params))
        optimizer = self.optimizer(jnp.zeros(()))
        # The frozen weights are an argument and no result, so they are never copied.
        self.arguments = params, arrays, optimizer.init(params), jnp.zeros(()), batch
        self.compiled = jax.jit(self._step).lower(*self.arguments).compile()
        memory: Any = self.compiled.memory_analysis()
        self.megabytes = (
            memory.argument_size_in_bytes + memory.temp_size_in_bytes
        ) / 1e6

    def start(self, seed: int) -> tuple[PyTree, PyTree, PyTree]:
        """What is trained, the frozen arrays, and what is no array."""
        head_key, adapter_key = jr.split(jr.key(seed))
        model = self.make(head_key)
        if self.method.is_full:
            whole = Classifier(self.lower, model.layers, model.head)
            params, frozen = eqx.partition(whole, eqx.is_inexact_array)
        else:
            if self.method.options is not None:
                model = lorax.loraify(
                    model, TARGETS, key=adapter_key, **self.method.options
                )
            params, frozen = lorax.partition(model, also=self.method.also)
        return params, *eqx.partition(frozen, eqx.is_array)

    def optimizer(self, learning_rate: Array) -> Any:
        return self.method.wrap(optax.adam(learning_rate), self.steps)

    def _step(
        self, params: PyTree, arrays: PyTree, state: PyTree, rate: Array, batch: Texts
    ) -> tuple[PyTree, PyTree, Array]:
        def of_params(params: PyTree) -> Array:
            model = eqx.combine(params, arrays, self.static)
            value = loss(model, batch)
            if self.method.penalty:
                value += self.method.penalty * lorax.orthogonality(model)
            return value

        value, gradient = jax.value_and_grad(of_params)(params)
        updates, state = self.optimizer(rate).update(gradient, state, params)
        return eqx.apply_updates(params, updates), state, value

    def train(
        self, seed: int, learning_rate: float, texts: Texts, size: int, tick: Any
    ) -> Classifier:
        """The trained model. The learning rate rises to `learning_rate` in the first
        tenth of the steps, and sinks to zero along a cosine."""
        params, arrays, _ = self.start(seed)
        state = self.optimizer(jnp.zeros(())).init(params)
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, self.steps // 10, self.steps
        )
        batches = toolbox.batches(texts, size, seed)
        for i, batch in zip(range(self.steps), batches):
            rate = jnp.asarray(schedule(i + 1))
            params, state, _ = self.compiled(params, arrays, state, rate, batch)
            tick()
        return eqx.combine(params, arrays, self.static)

    def seconds(self) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - begin


@eqx.filter_jit
def batch_logits(model: Classifier, batch: Texts) -> Float[Array, "text 2"]:
    return jax.vmap(model)(batch.x, batch.mask)


def evaluate(model: Classifier, texts: Texts) -> tuple[float, float]:
    """The loss and the accuracy. Adapters are merged first: one compilation for all."""
    if lorax.summary(model).targets:
        model = lorax.unloraify(model)
    starts = range(0, len(texts.labels), 64)
    parts = [toolbox.rows(texts, slice(i, i + 64)) for i in starts]
    logits = jnp.concatenate([batch_logits(model, part) for part in parts])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, texts.labels)
    right = logits.argmax(1) == texts.labels
    return float(jnp.nan_to_num(losses.mean(), nan=jnp.inf)), float(right.mean())


# The comparison


@dataclasses.dataclass
class Row:
    """The results of one method."""

    name: str
    trained: int
    learning_rate: float
    validation_losses: list[float]
    """For each learning rate."""
    accuracies: list[float]
    """On held-out rows, for each seed."""
    megabytes: float
    """Arguments of the compiled step, the optimizer's state among them, and what it
    needs in between."""
    milliseconds: float = 0.0

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.accuracies)


class Results:
    """The lines of a file, each of which is JSON. Those of other settings are left
    alone."""

    def __init__(self, file: Path, args: argparse.Namespace):
        self.file = file
        # What decides the result of a run. More seeds leave the others as they are.
        names = "steps batch_size layers length train_rows validation_rows test_rows"
        self.settings = {name: getattr(args, name) for name in [*names.split(), "seed"]}
        self.losses: dict[tuple[str, float], float] = {}
        """On validation rows, for each method and learning rate."""
        self.accuracies: dict[tuple[str, float, int], float] = {}
        """On held-out rows, for each method, learning rate and seed."""
        self.steps: dict[str, dict[str, Any]] = {}
        """The costs of a step, for each method."""
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text() if file.exists() else ""
        for line in text.splitlines():
            # A run that is killed may leave half a line.
            with contextlib.suppress(json.JSONDecodeError):
                self._take(json.loads(line))
        if text and not text.endswith("\n"):
            with file.open("a") as stream:
                stream.write("\n")

    def append(self, name: str, **figures: float) -> None:
        line = {"method": name, **figures, "settings": self.settings}
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if line.get("settings") != self.settings:
            return
        name: str = line["method"]
        if "validation_loss" in line:
            self.losses[name, line["learning_rate"]] = line["validation_loss"]
        elif "accuracy" in line:
            key = name, line["learning_rate"], line["seed"]
            self.accuracies[key] = line["accuracy"]
        else:
            costs = "trained", "megabytes", "milliseconds"
            self.steps[name] = {key: line[key] for key in costs}

    def best_rate(self, name: str) -> float:
        return min(LEARNING_RATES, key=lambda rate: self.losses[name, rate])

    def row(self, name: str, seeds: Sequence[int]) -> Row:
        best = self.best_rate(name)
        losses = [self.losses[name, rate] for rate in LEARNING_RATES]
        accuracies = [self.accuracies[name, best, seed] for seed in seeds]
        return Row(
            name,
            learning_rate=best,
            validation_losses=losses,
            accuracies=accuracies,
            **self.steps[name],
        )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = _parser()
    args = parser.parse_args(argv)
    _check_flags(parser, args)
    lower, make = load_halves(args.layers)
    raw_train, raw_test = load_reviews(args, parser)
    below = functools.partial(compute_lower, lower)
    count = args.validation_rows
    splits = [
        toolbox.rows(raw_train, slice(count, None)),
        toolbox.rows(raw_train, slice(count)),
        raw_test,
    ]
    whole = [Texts(*reviews) for reviews in splits]
    halves = [below(reviews) for reviews in splits]
    batches = toolbox.batches(halves[0], args.batch_size, args.seed)
    calibration = [batch for _, batch in zip(range(8), batches)]
    methods = list_methods(make(jr.key(args.seed)), calibration)
    if args.only:
        if unknown := [name for name in args.only if name not in methods]:
            parser.error(f"--only {unknown[0]!r} is none of {', '.join(methods)}")
        methods = {name: methods[name] for name in args.only}

    @functools.cache  # Compiled only if something of the method is missing.
    def trainer(name: str) -> Trainer:
        method = methods[name]
        texts = whole[0] if method.is_full else halves[0]
        batch = toolbox.rows(texts, slice(args.batch_size))
        return Trainer(method, make, lower, batch, args.steps)

    results = Results(args.results or args.output / "compare_methods.jsonl", args)
    runs = len(methods) * (len(LEARNING_RATES) + args.seeds)
    progress = tqdm(total=runs * args.steps, desc="Training", unit="step")
    for name, method in methods.items():
        progress.set_postfix_str(name)
        texts, validation, test = whole if method.is_full else halves

        def train(seed: int, rate: float) -> Classifier:
            size, tick = args.batch_size, progress.update
            return trainer(name).train(seed, rate, texts, size, tick)

        models: dict[float, Classifier] = {}
        for rate in LEARNING_RATES:
            if (name, rate) in results.losses:
                progress.update(args.steps)
                continue
            models[rate] = train(args.seed, rate)
            value, _ = evaluate(models[rate], validation)
            results.append(name, learning_rate=rate, validation_loss=value)
        best = results.best_rate(name)
        for seed in range(args.seed, args.seed + args.seeds):
            is_there = seed == args.seed and best in models
            if (name, best, seed) in results.accuracies or is_there:
                progress.update(args.steps)
            if (name, best, seed) not in results.accuracies:
                model = models[best] if is_there else train(seed, best)
                _, accuracy = evaluate(model, test)
                results.append(name, learning_rate=best, seed=seed, accuracy=accuracy)
    progress.close()
    if not methods.keys() <= results.steps.keys():
        trainers = {name: trainer(name) for name in methods}
        seconds = measure_seconds(trainers, args.rounds)
        for name, of_one in trainers.items():
            results.append(
                name,
                trained=of_one.trained,
                megabytes=of_one.megabytes,
                milliseconds=1000 * seconds[name],
            )
    seeds = range(args.seed, args.seed + args.seeds)
    rows = [results.row(name, seeds) for name in methods]
    print_table(rows)
    draw(rows, args.output / "methods.png")
    print(f"\nChart and figures: {args.output / 'methods.png'}, {results.file}")
    return rows


def compute_lower(lower: Lower, reviews: Reviews) -> Texts:
    """What the frozen lower layers return, computed in batches."""
    fn = eqx.filter_jit(eqx.filter_vmap(lower))
    starts = range(0, len(reviews.labels), 64)
    parts = [toolbox.rows(reviews, slice(i, i + 64)) for i in starts]
    x = jnp.concatenate([fn(part.tokens, part.mask) for part in parts])
    return Texts(x, reviews.mask, reviews.labels)


def measure_seconds(trainers: dict[str, Trainer], rounds: int) -> dict[str, float]:
    """The median for each. All take turns, so that what else the machine does is the
    same for all."""
    seconds = [[one.seconds() for one in trainers.values()] for _ in range(rounds)]
    medians = [statistics.median(of_one) for of_one in zip(*seconds)]
    return dict(zip(trainers, medians, strict=True))


# Output


def print_table(rows: Sequence[Row]) -> None:
    print(f"\n{'':18}{'trained':>12}{'accuracy':>16}{'rate':>10}{'ms':>8}{'MB':>8}")
    for row in rows:
        accuracy = f"{row.mean:.3f} ± {row.spread:.3f}"
        line = f"{row.name:18}{row.trained:>12,}{accuracy:>16}{row.learning_rate:>10g}"
        print(f"{line}{row.milliseconds:>8.0f}{row.megabytes:>8.0f}")


def draw(rows: Sequence[Row], file: Path) -> None:
    """The accuracy of each seed, and the time of a step."""
    figure = Figure(figsize=(9, 0.8 + 0.3 * len(rows)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        color = "tab:red" if row.name in ("lora", "full fine-tuning") else "0.35"
        left.plot(row.accuracies, [y] * len(row.accuracies), "o", color=color, ms=4)
        left.plot(row.mean, y, "|", color=color, ms=16, mew=2)
        if row.name in ("head alone", "full fine-tuning"):
            left.axvline(row.mean, color=color, lw=1, ls="--", alpha=0.6, zorder=0)
        right.barh(y, row.milliseconds, color=color, height=0.6)
        text = f" {row.trained:,}"
        right.text(row.milliseconds, y, text, va="center", fontsize=8)
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    left.invert_yaxis()
    left.set_xlabel("held-out accuracy: each seed, and their mean")
    right.set_xlabel("ms for a step; numbers trained")
    right.margins(x=0.3)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    toolbox.save_figure(figure, file)


# Flags


def _parser() -> toolbox.Parser:
    parser = toolbox.Parser(__doc__)
    parser.add_sizes(
        ("--steps", 96, "training steps of each run"),
        ("--batch-size", 16, "reviews in a batch"),
        ("--seeds", 3, "runs with the learning rate that was chosen"),
        ("--layers", 3, "upper layers that are adapted, of six"),
        ("--length", 24, "tokens to which reviews are cut and padded"),
        ("--train-rows", 2256, "reviews to train on and to choose learning rates with"),
        ("--validation-rows", 256, "how many of them are for choosing"),
        ("--test-rows", 1024, "reviews to hold out"),
        ("--rounds", 9, "measurements of a step"),
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some methods alone")
    parser.add_argument("--seed", type=toolbox.seed, default=0, help="the first one")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder")
    help = "where results are appended; in the folder of --output if not given"
    parser.add_argument("--results", type=Path, metavar="FILE", help=help)
    return parser


def _check_flags(parser: toolbox.Parser, args: argparse.Namespace) -> None:
    if not 3 <= args.length <= 512:
        parser.error("--length must be from 3 to 512, the positions that MiniLM knows")
    if args.layers > 5:
        parser.error("--layers must be at most 5: MiniLM has six, and one is below")
    if args.seeds < 2:
        parser.error("--seeds must be at least 2, for there to be a spread")
    if args.train_rows % 2 or args.test_rows % 2:
        parser.error("--train-rows and --test-rows must be even: half are positive")
    parser.check_batch_size(args.batch_size, args.train_rows - args.validation_rows)


if __name__ == "__main__":
    main()
