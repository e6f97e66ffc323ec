"""Serve MiniLM with sixteen adapters at once: a batch of texts, each with its own.

All adapters share one base. With `lorax.stack` each text picks its adapter;
`lorax.AdapterBank` places all of them side by side, which is faster for single tokens.
Both are compared with one text after the other, and timed beside the base alone and a
loop over the adapters.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import eqx_lorax as lorax
import minilm
import toolbox


with toolbox.install_hint():
    from matplotlib.figure import Figure
    from tqdm import tqdm


class Requests(eqx.Module):
    """Texts, and the index of the adapter for each of them."""

    tokens: Int[Array, "text seq"]
    mask: Bool[Array, "text seq"]
    adapter: Int[Array, " text"]


Embeddings = Float[Array, "text hidden"]


@dataclasses.dataclass(frozen=True)
class Case:
    """The time for one batch, and a check of the results."""

    title: str
    seconds: dict[str, float]
    over_base: dict[str, float]
    """The median of the ratios to the base alone in the same round."""
    difference: float
    """The largest to the same texts one by one."""


@dataclasses.dataclass(frozen=True)
class Result:
    cases: list[Case]
    picture: Path


def main(argv: Sequence[str] | None = None) -> Result:
    parser = _parser()
    args = parser.parse_args(argv)
    model_key, adapter_key, request_key = jr.split(jr.key(args.seed), 3)
    plain = minilm.load_minilm()
    try:
        adapted = lorax.loraify(plain, args.targets, rank=args.rank, key=model_key)
    except ValueError as error:
        parser.error(str(error))
    params, frozen = lorax.partition(adapted)
    adapters = [made(params, key) for key in jr.split(adapter_key, args.adapters)]
    print(
        f"{args.adapters} adapters of rank {args.rank} on "
        f"{', '.join(args.targets)}: {toolbox.megabytes(params)} each, and one base of "
        f"{toolbox.megabytes(frozen)}",
        end="\n\n",
    )

    cases = []
    for length in (args.length, 1):
        requests = make_requests(args, length, request_key)
        tokens = f"{length} tokens" if length > 1 else "one token"
        title = f"{args.requests} requests of {tokens}"
        cases.append(serve(title, plain, frozen, adapters, requests, args.rounds))
        show(cases[-1])
    picture = args.output / "many_adapters.png"
    draw(cases, picture)
    print(f"Picture                   {picture}")
    return Result(cases, picture)


def made(params: PyTree, key: PRNGKeyArray) -> PyTree:
    """An untrained adapter with an update about as large as a trained one's."""
    leaves, treedef = jax.tree.flatten(params)
    drawn = [
        jr.normal(key, leaf.shape, leaf.dtype) / 20
        for key, leaf in zip(jr.split(key, len(leaves)), leaves)
    ]
    return jax.tree.unflatten(treedef, drawn)


def make_requests(args: argparse.Namespace, length: int, key: PRNGKeyArray) -> Requests:
    """Lines of this library's own documentation, each with a random adapter."""
    text = toolbox.documentation().decode()
    lines = [line.strip() for line in text.splitlines() if len(line.split()) > 5]
    tokenizer = minilm.load_tokenizer(max(length, 3))
    tokens, mask = minilm.tokenize(tokenizer, (lines * args.requests)[: args.requests])
    # A single token is the first word, which follows the token `[CLS]`.
    part = slice(1, 2) if length == 1 else slice(None)
    adapter = jr.randint(key, (args.requests,), 0, args.adapters)
    return Requests(tokens[:, part], mask[:, part], adapter)


# Serving


def embed(model: minilm.Bert, tokens: Array, mask: Array) -> Array:
    return minilm.mean_pool(model(tokens, mask), mask)


@eqx.filter_jit
def by_base(plain: minilm.Bert, requests: Requests) -> Embeddings:
    return jax.vmap(lambda t, m: embed(plain, t, m))(requests.tokens, requests.mask)


@eqx.filter_jit
def by_stack(stacked: PyTree, frozen: PyTree, requests: Requests) -> Embeddings:
    def one(index: Array, tokens: Array, mask: Array) -> Array:
        params = jax.tree.map(lambda array: array[index], stacked)
        return embed(lorax.combine(params, frozen), tokens, mask)

    return jax.vmap(one)(requests.adapter, requests.tokens, requests.mask)


@eqx.filter_jit
def by_bank(bank: lorax.AdapterBank, frozen: PyTree, requests: Requests) -> Embeddings:
    def one(index: Array, tokens: Array, mask: Array) -> Array:
        return embed(lorax.combine(bank[index], frozen), tokens, mask)

    return jax.vmap(one)(requests.adapter, requests.tokens, requests.mask)


@eqx.filter_jit
def by_one(params: PyTree, frozen: PyTree, tokens: Array, mask: Array) -> Embeddings:
    model = lorax.combine(params, frozen)
    return jax.vmap(lambda t, m: embed(model, t, m))(tokens, mask)


def by_loop(
    adapters: Sequence[PyTree], frozen: PyTree, requests: Requests
) -> Embeddings:
    """The way without a stack: one adapter after the other, with all of its texts."""
    asked = np.asarray(requests.adapter)
    embedded = np.empty((len(asked), minilm_width(frozen)), np.float32)
    for index, params in enumerate(adapters):
        which = np.flatnonzero(asked == index)
        if len(which):
            embedded[which] = by_one(
                params, frozen, requests.tokens[which], requests.mask[which]
            )
    return jnp.asarray(embedded)


def minilm_width(model: Any) -> int:
    return model.embeddings.words.embedding_size


def serve(
    title: str,
    plain: minilm.Bert,
    frozen: PyTree,
    adapters: Sequence[PyTree],
    requests: Requests,
    rounds: int,
) -> Case:
    stacked, bank = lorax.stack(adapters), lorax.AdapterBank(adapters)
    ways: dict[str, Callable[[], Embeddings]] = {
        "base alone": lambda: by_base(plain, requests),
        "stack": lambda: by_stack(stacked, frozen, requests),
        "bank": lambda: by_bank(bank, frozen, requests),
        "loop over adapters": lambda: by_loop(adapters, frozen, requests),
    }
    texts = zip(requests.adapter, requests.tokens, requests.mask)
    one_by_one = jnp.concatenate(
        [
            by_one(adapters[int(index)], frozen, tokens[None], mask[None])
            for index, tokens, mask in texts
        ]
    )
    found = {name: way() for name, way in ways.items()}  # compiles
    difference = max(
        float(jnp.abs(found[name] - one_by_one).max())
        for name in ("stack", "bank", "loop over adapters")
    )
    if difference > 1e-4:
        raise RuntimeError(f"The batch is {difference:.1e} off its texts one by one.")
    if jnp.abs(found["base alone"] - one_by_one).max() < 0.01:
        raise RuntimeError("The adapters do nothing.")

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc=title, unit="round"):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            seconds[name].append(time.perf_counter() - start)
    base = seconds["base alone"]
    return Case(
        title,
        {name: statistics.median(times) for name, times in seconds.items()},
        {
            name: statistics.median(x / y for x, y in zip(times, base))
            for name, times in seconds.items()
        },
        difference,
    )


# Output


def show(case: Case) -> None:
    print(f"{case.title:<34}{'ms a batch':>12}{'over the base':>16}")
    for name, seconds in case.seconds.items():
        ratio = case.over_base[name]
        print(f"  {name:<32}{1000 * seconds:>12.1f}{ratio:>16.2f}")
    exactly = f"within {case.difference:.0e}" if case.difference else "bit for bit"
    print(f"The same as one by one, {exactly}.", end="\n\n", flush=True)


def draw(cases: Sequence[Case], file: Path) -> None:
    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    figure.suptitle("A batch in which each text has its own adapter", fontweight="bold")
    for axes, case in zip(figure.subplots(1, len(cases), sharey=True), cases):
        names = list(case.over_base)[::-1]
        ratios = [case.over_base[name] for name in names]
        colours = ["0.6" if name == "base alone" else "tab:blue" for name in names]
        bars = axes.barh(names, ratios, color=colours)
        axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
        axes.axvline(1, color="0.4", linewidth=1, linestyle=":")
        axes.set_title(case.title, fontsize=10)
        axes.set_xlabel("Time over that of the base alone")
        axes.set_xlim(0, 1.18 * max(ratios))
        axes.spines[["top", "right"]].set_visible(False)
    toolbox.save_figure(figure, file)


# Flags


def _parser() -> argparse.ArgumentParser:
    parser = toolbox.Parser(__doc__)
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["query", "value"],
        metavar="PATTERN",
        help="what the adapters are on",
    )
    parser.add_sizes(
        ("--adapters", 16, "how many there are"),
        ("--rank", 16, "rank of the adapters"),
        ("--requests", 64, "texts in a batch"),
        ("--length", 32, "tokens to which texts are cut and padded"),
        ("--rounds", 15, "how often each way is timed"),
    )
    parser.add_argument("--seed", type=toolbox.seed, default=0, help="of all draws")
    help = "folder for the picture"
    parser.add_argument("--output", type=Path, default=Path("out"), help=help)
    return parser


if __name__ == "__main__":
    main()
