"""How much adapters add to the time that JAX needs to trace and lower a model.

    python benchmarks/tracing.py [--layers 48] [--repeats 9]

There are two transformers, with adapters on all matrices: a plain function of a tree of
arrays, which uses only `jax.numpy` and is traced by `lorax.lora`; and an Equinox model,
unrolled and scanned, through both doors. Prints the median of the repeats in seconds,
and the median of the ratios of neighbouring repeats. The gradient of the plain model is
with respect to its inputs.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from harness import flag_parser
from transformer import make_transformer

import eqx_lorax as lorax


WIDTH, HEADS, TOKENS = 64, 4, 16


def normalised(x: Any, gain: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * gain


def block(p: dict[str, Any], x: Any) -> Any:
    y = normalised(x, p["gain 1"])
    q, k, v = ((y @ p[name]).reshape(TOKENS, HEADS, -1) for name in "qkv")
    scores = jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(q.shape[-1])
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
    x = x + mixed.reshape(TOKENS, WIDTH) @ p["o"]
    y = normalised(x, p["gain 2"])
    return x + jax.nn.gelu(y @ p["up"] + p["bias"]) @ p["down"]


def function(params: list[dict[str, Any]], x: Any) -> Any:
    for p in params:
        x = block(p, x)
    return x.sum()


def block_params() -> dict[str, Any]:
    square, wide = jnp.ones((WIDTH, WIDTH)), jnp.ones((WIDTH, 4 * WIDTH))
    gains = {"gain 1": jnp.ones(WIDTH), "gain 2": jnp.ones(WIDTH)}
    matrices = dict.fromkeys("qkvo", square) | {"up": wide, "down": wide.T}
    return {**matrices, **gains, "bias": jnp.ones(4 * WIDTH)}


def run(model: Any, x: Any) -> Any:
    return model(x).sum()


def factor_gradient(model: Any, x: Any) -> Any:
    """The gradient with respect to the factors and the inputs."""
    params, frozen = lorax.partition(model)
    loss = lambda params, x: run(eqx.combine(params, frozen), x)  # noqa: E731
    return jax.grad(loss, (0, 1))(params, x)


def seconds(fn: Callable[..., Any], tree: Any, x: Any, lower: bool) -> float:
    """The seconds to trace `fn(tree, x)`, and to lower it too if requested."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    # A new function, so that JAX does not use its cache.
    new = lambda arrays, x: fn(eqx.combine(arrays, rest), x)  # noqa: E731
    start = time.perf_counter()
    jax.jit(new).lower(arrays, x) if lower else jax.make_jaxpr(new)(arrays, x)
    return time.perf_counter() - start


def report(
    name: str, plain: Any, adapted: Any, x: Any, repeats: int, lower: bool = False
) -> None:
    """`plain` and `adapted` are pairs of a function and its tree."""
    pairs = []
    for i in range(repeats + 1):
        pair = [seconds(fn, tree, x, lower) for fn, tree in (plain, adapted)]
        pairs += [pair] if i else []  # the first one imports and compiles
    times = [statistics.median(column) for column in zip(*pairs)]
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"{name:<34}{times[0]:>9.3f}{times[1]:>10.3f}{ratio:>8.2f}", flush=True)


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    flags = parser.parse_args()

    x = jnp.ones((TOKENS, WIDTH))
    params = [block_params() for _ in range(flags.layers)]
    spec = lorax.simple_spec(params, lambda path, array: 8)
    lora_params = lorax.init_lora(params, spec, jr.key(0))
    model, stacked = (
        make_transformer(form, flags.layers, WIDTH, HEADS)
        for form in ("unrolled", "scanned")
    )
    adapted, adapted_stack = (
        lorax.loraify(plain, rank=8, key=jr.key(1)) for plain in (model, stacked)
    )

    through_lora = lorax.lora(function, on_materialise="error")
    run_lora = lorax.lora(run, on_materialise="error")

    def gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(fn, 1)

    print(f"{'':<34}{'plain':>9}{'adapted':>10}{'ratio':>8}")
    of = flags.repeats
    tree, tree_lora = params, lora_params
    report("function", (function, tree), (through_lora, tree_lora), x, of)
    report(
        "function, gradient",
        (gradient(function), tree),
        (gradient(through_lora), tree_lora),
        x,
        of,
    )
    report("Equinox model, function door", (run, model), (run_lora, adapted), x, of)
    report("Equinox model, module door", (run, model), (run, adapted), x, of)

    print("\nTrace and lower, module door")
    for form, plain, with_adapters in (
        ("unrolled", model, adapted),
        ("scanned", stacked, adapted_stack),
    ):
        report(form, (run, plain), (run, with_adapters), x, of, lower=True)
        report(
            f"{form}, gradient",
            (gradient(run), plain),
            (factor_gradient, with_adapters),
            x,
            of,
            lower=True,
        )


if __name__ == "__main__":
    main()
