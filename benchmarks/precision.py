"""How much of a small adapter is left in the output, and how exact the output is.

    python benchmarks/precision.py

There is a 1024 × 1024 base, with adapters of relative size `|s B A| / |W|`, and
products have the default precision of the device. Prints

- the share of the adapter's effect that is in the output: the difference between the
  outputs with and without the adapter, regressed on the same difference in float64. One
  is perfect;
- the difference of outputs from those in float64: for narrow dtypes in units in the
  last place (rounding alone gives up to a half), otherwise relative to the largest;
- the number of arrays with the base's shape that a compiled step makes in a wider dtype
  than that of the activations.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import eqx_lorax as lorax


WIDTH, RANK, TOKENS = 1024, 8, 512
SIZES = (1e-4, 1e-3, 1e-2)
COLUMNS = (
    "modules",
    "function",
    "narrow factors",
    "merged forward",
    "naive",
    "naive, merged",
)
# Dtypes of the base and of the activations.
DTYPES = [
    (jnp.float32, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16),
    (jnp.float8_e4m3fn, jnp.bfloat16),
    (jnp.float8_e5m2, jnp.bfloat16),
]


class Layer(eqx.Module):
    """Accepts bases with fewer bits than the activations."""

    w: Any

    def __call__(self, x: Any) -> Any:
        return self.w.astype(x.dtype) @ x


def modules(layer: Layer, x: jax.Array) -> jax.Array:
    return jax.vmap(layer)(x)


def function(layer: Layer, x: jax.Array) -> jax.Array:
    return lorax.lora(lambda w, x: x @ w.astype(x.dtype).T)(layer.w, x)


def merged_forward(layer: Layer, x: jax.Array) -> jax.Array:
    return jax.vmap(lorax.merged_forward(layer))(x)


def naive(layer: Layer, x: jax.Array) -> jax.Array:
    """A straightforward implementation."""
    w, b, a = (y.astype(x.dtype) for y in (layer.w.w, layer.w.b, layer.w.a))
    return x @ w.T + (x @ a.T) @ b.T


def naive_merged(layer: Layer, x: jax.Array) -> jax.Array:
    w, b, a = (y.astype(x.dtype) for y in (layer.w.w, layer.w.b, layer.w.a))
    return x @ (w + b @ a).T


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


class Example:
    """A layer with an adapter of some relative size, and its output in float64."""

    def __init__(self, dtype: Any, x_dtype: Any, size: float):
        keys = jr.split(jr.key(0), 4)
        w = (jr.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5).astype(dtype)
        self.x = jr.normal(keys[1], (TOKENS, WIDTH), x_dtype)
        self.fresh: Any = lorax.loraify(Layer(w), "w", rank=RANK, key=keys[2])
        a, b = wide(self.fresh.w.a), wide(jr.normal(keys[3], self.fresh.w.b.shape))
        b *= size * np.linalg.norm(wide(w)) / np.linalg.norm(b @ a)
        # The same numbers in every dtype.
        b, a = (jnp.asarray(y, x_dtype).astype(jnp.float32) for y in (b, a))
        self.fresh = self.of(jnp.zeros_like(b), a)
        self.adapted = self.of(b, a)
        b, a, x = wide(b), wide(a), wide(self.x)
        self.update = self.fresh.w.scale * x @ a.T @ b.T
        self.exact = x @ wide(w).T + self.update

    def of(self, b: jax.Array, a: jax.Array) -> Layer:
        return Layer(self.fresh.w.replace(b=b, a=a))

    def narrow(self, layer: Layer) -> Layer:
        b, a = (y.astype(self.x.dtype) for y in (layer.w.b, layer.w.a))
        return self.of(b, a)

    def outputs(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Outputs with the adapter and with an empty one, or nothing if there are
        none."""
        pair = self.adapted, self.fresh
        call: Callable[[Layer, jax.Array], jax.Array]
        if name == "narrow factors":
            call, pair = modules, (self.narrow(pair[0]), self.narrow(pair[1]))
        elif name == "merged forward":
            if self.fresh.w.dtype != jnp.float32:
                return None
            call = merged_forward
        else:
            call = {
                "modules": modules,
                "function": function,
                "naive": naive,
                "naive, merged": naive_merged,
            }[name]
        run = eqx.filter_jit(call)
        return wide(run(pair[0], self.x)), wide(run(pair[1], self.x))


def share(example: Example, name: str) -> float | None:
    outputs = example.outputs(name)
    if outputs is None:
        return None
    difference, expected = outputs[0] - outputs[1], example.update
    return float((difference * expected).sum() / (expected * expected).sum())


def error(example: Example, name: str) -> float | None:
    outputs = example.outputs(name)
    if outputs is None:
        return None
    off, dtype = np.abs(outputs[0] - example.exact), example.x.dtype
    if dtype == jnp.float32:
        return float(off.max() / np.abs(example.exact).max())
    units = 2.0 ** np.floor(np.log2(np.abs(example.exact)))
    # Near zero the error of a float32 sum is as large as one unit.
    is_large = np.abs(example.exact) > 0.1
    return float((off / units / float(jnp.finfo(dtype).eps))[is_large].max())


def wide_copies(example: Example, name: str) -> int | None:
    """Counts arrays of the base's shape, in a dtype with more bits, in the compiled
    gradient of factors and inputs."""
    layer = example.narrow(example.adapted)
    if name in ("modules", "function"):
        layer = example.adapted
    elif name != "narrow factors":
        return None
    call = function if name == "function" else modules
    params, frozen = lorax.partition(layer)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y = call(lorax.combine(params, frozen), x)
        return jnp.square(y.astype(jnp.float32)).mean()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    text = str(gradient.lower(params, example.x).compile().as_text())
    bits = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
    own = 8 * example.x.dtype.itemsize  # the layer itself casts to this
    made = re.findall(rf"\b([a-z0-9]+)\[{WIDTH},{WIDTH}\]", "\n".join(stored(text)))
    return sum(bits[dtype] > own for dtype in made)


def stored(text: str) -> list[str]:
    """The types of the arrays that a compiled program stores in memory. Arrays inside a
    fused computation are in registers."""
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text))
    types, is_fused = [], False
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            is_fused = start[1] in fused
        made = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(", line)
        if made and not is_fused and made[2] not in ("parameter", "tuple", "bitcast"):
            types.append(made[1])
    return types


def print_table(
    title: str,
    columns: Sequence[str],
    figure: Callable[[Example, str], float | None],
    shown: str,
    sizes: Sequence[float],
) -> None:
    print(f"\n{title:<34}" + "".join(f"{name:>16}" for name in columns))
    for dtype, x_dtype in DTYPES:
        for size in sizes:
            example = Example(dtype, x_dtype, size)
            names = jnp.dtype(dtype).name, jnp.dtype(x_dtype).name
            case = f"{' × '.join(dict.fromkeys(names))}, {size:.0e}"
            figures = [figure(example, name) for name in columns]
            cells = ["" if x is None else format(x, shown) for x in figures]
            print(f"{case:<34}" + "".join(f"{x:>16}" for x in cells), flush=True)


def main() -> None:
    device = jax.devices()[0]
    print(f"{device.platform}: {device.device_kind}, jax {jax.__version__}")
    print_table("share of the update", COLUMNS, share, ".3f", SIZES)
    print_table("error", COLUMNS, error, ".2g", SIZES[-1:])
    print_table("wide copies of the base", COLUMNS[:3], wide_copies, "d", SIZES[-1:])


if __name__ == "__main__":
    main()
