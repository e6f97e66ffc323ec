"""Random small programs over adapted and plain arrays. Their values and gradients are
compared with those of the dense programs."""

import functools

import equinox as eqx
import interpreter
import jax
import jax.lax as lax
import jax.numpy as jnp
import numpy as np
from functions import factored, normal
from helpers import is_weight

import eqx_lorax as lorax


NAMES = {"jax": jax, "jnp": jnp, "lax": lax}
INDICES = {"ids": np.array([3, 0, 1, 3, 2]), "i": np.array(1)}
LINES = 5
# The tolerance for a cast to float32 on the way.
TOLERANCE, TOLERANCE_CAST = 1e-9, 3e-5


@functools.cache
def parameters():
    """Weights and plain arrays. Call this with float64 enabled."""
    make = functools.partial(factored, dtype="float64")
    inner = make((7, 5), rank=1, seed=5)
    nested = eqx.tree_at(lambda weight: weight.w, make((7, 5), seed=6), inner)
    arrays = functools.partial(normal, dtype="float64")
    return {
        "w": make((7, 5)),
        "v": make((4, 5), rank=1, seed=1),
        "q": make((5, 5), rank=3, seed=2),
        "s": make((3, 5, 5), seed=3),
        "k": make((4, 3, 2), rows=(-3,), columns=(-2, -1), seed=4),
        "n": nested,
        "t": arrays(7, 5, seed=7),
        "u": arrays(2, 5, seed=8),
        "o": arrays(1, 5, seed=9),
        "m": arrays(1, 5, 5, seed=10),
        "g": arrays(5, seed=11),
        "c": arrays(seed=12),
        # Operands for products with weights.
        "e": arrays(64, seed=13),
        "f": arrays(3, 64, seed=14),
    }


def dense_of(tree):
    """The dense arrays, with the derivatives that the weights must have."""

    def of_weight(x):
        if not is_weight(x):
            return x
        base = lax.stop_gradient(of_weight(x.w))
        batch = base.ndim - len(x.rows) - len(x.columns)
        b = x.b.reshape(*x.b.shape[:batch], -1, x.rank)
        a = x.a.reshape(*x.a.shape[:batch], x.rank, -1)
        return base + x.scale * (b @ a).reshape(base.shape)

    return jax.tree.map(of_weight, tree, is_leaf=is_weight)


def program(*lines):
    """The source of a program over `parameters()`."""
    names = (*"wvqskntuomgcef", *INDICES)
    return "\n    ".join([f"def program({', '.join(names)}):", *lines])


class Writer:
    """Writes a program line by line. Lines that would fail are left out."""

    def __init__(self, seed, shapes):
        self.random = np.random.default_rng([seed, 2026])
        self.known = dict(shapes)
        self.unread = {}
        self.lines = []
        while len(self.lines) < LINES:
            # Prefers computed values, so that operations accumulate.
            self.write(self.choose(MOVES)(self))
        for name in [*self.unread]:
            self.write(self.choose(MEETINGS)(self, name))
        self.source = program(*self.lines, f"return {', '.join(self.unread)},")

    def write(self, right):
        space = NAMES | {name: np.asarray(x) for name, x in INDICES.items()}

        def evaluated(known):
            return eval(right, space | known)

        try:
            shape = jax.eval_shape(evaluated, self.known)
        except (TypeError, ValueError, IndexError):
            return
        if not 0 < shape.size <= 700 or shape.ndim > 4:
            return
        name = f"z{len(self.lines)}"
        self.lines.append(f"{name} = {right}")
        for other in [*self.unread]:
            if other in set(_words(right)):
                del self.unread[other]
        self.known[name] = self.unread[name] = shape

    def choose(self, options):
        options = list(options)
        return options[self.random.integers(len(options))]

    def chance(self, probability):
        return self.random.random() < probability

    def number(self, low, high):
        return int(self.random.integers(low, high + 1))

    def value(self, ndim=None):
        """The name of an array, more often a computed one than a parameter."""
        names = [*self.known][:-1] if self.chance(0.5) else [*self.unread]
        names = [x for x in names if x not in "cef"]
        fits = [x for x in names if ndim in (None, self.known[x].ndim)]
        return self.choose(fits or [x for x in self.known if x not in "cef"])

    def shape(self, name):
        return self.known[name].shape

    def axis(self, name):
        return self.number(0, max(self.known[name].ndim - 1, 0))


def _words(source):
    return "".join(x if x.isalnum() else " " for x in source).split()


def _make_edit(r):
    first = r.value()
    axis = r.axis(first)
    parts = [first, *(r.value(r.known[first].ndim) for _ in range(r.number(1, 2)))]
    shapes = [r.shape(part) for part in parts]
    if len({len(shape) for shape in shapes}) > 1:
        return f"jnp.append({first}, {first}[:1], 0)"
    sizes = np.min(shapes, axis=0)
    kind = r.choose(["concatenate", "concatenate", "concatenate", "stack"])

    def cut(part, shape):
        cuts = [
            ":" if size == wanted or (i == axis and kind != "stack") else f":{wanted}"
            for i, (size, wanted) in enumerate(zip(shape, sizes))
        ]
        return part if set(cuts) <= {":"} else f"{part}[{', '.join(cuts)}]"

    pieces = [cut(part, shape) for part, shape in zip(parts, shapes)]
    r.random.shuffle(pieces)
    return f"jnp.{kind}([{', '.join(pieces)}], {axis})"


def _rolled(r):
    x = r.value()
    return f"jnp.roll({x}, {r.number(-2, 3)}, {r.axis(x)})"


def _pad_rank(r):
    x = r.value()
    widths = [(r.number(0, 2), r.number(0, 2)) for _ in r.shape(x)]
    modes = ["edge", "reflect", "symmetric", "wrap", "constant", "linear_ramp"]
    # Instead of "empty", whose padding has undefined values.
    modes += ["mean", "constant"]
    return f"jnp.pad({x}, {widths}, {r.choose(modes)!r})"


def _sliced(r):
    x = r.value()
    if not r.shape(x):
        return f"{x}[None]"
    cuts = []
    for size in r.shape(x):
        start = r.number(0, max(size - 1, 0))
        stop = r.number(start + 1, max(size, start + 1))
        options = [":", ":", f"{start}:{stop}", "::-1", "::2", f"{start}:", f":{stop}"]
        cuts.append(r.choose([*options, f"{start}"]))
    return f"{x}[{', '.join(cuts)}]"


def _turned(r):
    x = r.value()
    order = r.random.permutation(r.known[x].ndim).tolist()
    return r.choose([f"jnp.transpose({x}, {order})", f"{x}.T"])


def _reshaped(r):
    x = r.value()
    shape = list(r.shape(x))
    axis = r.axis(x)
    if not shape:
        return f"{x}[None]"
    options = [f"jnp.expand_dims({x}, {axis})", f"{x}[..., None]"]
    if 1 in shape:
        options += [f"jnp.squeeze({x}, {shape.index(1)})"] * 2
    for divisor in (2, 3, 5, 7):
        if shape[axis] % divisor == 0:
            split = [*shape[:axis], divisor, -1, *shape[axis + 1 :]]
            options.append(f"{x}.reshape({split})")
    if axis + 1 < len(shape):
        merged = [*shape[:axis], -1, *shape[axis + 2 :]]
        options.append(f"{x}.reshape({merged})")
    return r.choose(options)


def _repeated(r):
    x = r.value()
    shape = list(r.shape(x))
    options = [
        f"jnp.broadcast_to({x}, {[2, *shape]})",
        f"jnp.tile({x}, {[2] + [1] * (len(shape) - 1)})",
        f"jnp.repeat({x}, 2, {r.axis(x)})",
    ]
    return r.choose(options)


def _scaled(r):
    x = r.value()
    last = r.shape(x)[-1] if r.shape(x) else 1
    first = r.shape(x)[0] if r.shape(x) else 1
    rest = [1] * (r.known[x].ndim - 1)
    return r.choose(
        [
            f"{x} * 0.7",
            f"-{x}",
            f"{x} / 1.3",
            f"{x} * c",
            f"c * {x}",
            f"{x} * e[:{last}].reshape({[*rest, -1]})",
            f"{x} * e[5:{first + 5}].reshape({[-1, *rest]})",
        ]
    )


def _mixed(r):
    """Operations without a factored form, or without a derivative."""
    x = r.value()
    return r.choose(
        [
            f"jnp.tanh({x})",
            f"{x} + 0.1",
            f"{x} + {x}",
            f"jnp.tril({x})",
            f"jnp.where({x} > 0, {x}, 0.3 * {x})",
            f"lax.stop_gradient({x})",
            f"lax.stop_gradient({x})",
            f"{x}.at[0].set(0.5)",
            f"{x}.at[0].add({x}[-1])",
            f"lax.optimization_barrier({x})",
            f"{x}.astype(jnp.float32).astype(jnp.float64)",
        ]
    )


def _programs(r):
    """Programs inside the program."""
    x, y = r.value(), r.value()
    return r.choose(
        [
            f"jax.jit(lambda a: jnp.concatenate([a, a[:1]], 0))({x})",
            f"jax.checkpoint(lambda a: jnp.roll(a, 1, 0))({x})",
            f"jax.checkpoint(lambda a: jnp.tanh(a @ a.T))({x})",
            f"jax.jit(lambda a, b: a @ b.T)({x}, {y})",
            f"jax.vmap(lambda a: jnp.roll(a, 1, 0))({x})",
            f"jax.vmap(lambda a: jnp.append(a, a[:1], 0), 1)({x})",
            f"lax.map(lambda a: 2.0 * a.T, {x})",
            f"lax.cond(i > 0, lambda a: a[:1], lambda a: a[-1:], {x})",
            f"lax.cond(i > 0, lambda a: jnp.roll(a, 1, 0), lambda a: a, {x})",
            f"lax.scan(lambda h, _: (jnp.roll(h, 1, 0), h[0]), {x}, length=2)[0]",
            f"lax.scan(lambda h, a: (h + a.sum(), a[::-1]), c, {x})[1]",
        ]
    )


def _multiplied(r):
    x, y = r.value(2), r.value(2)
    return r.choose([f"{x} @ {y}", f"{x} @ {y}.T", f"{x}.T @ {y}", f"{x} @ {x}.T"])


def _met(r):
    return _meeting(r, r.value())


def _meeting(r, x):
    shape = r.shape(x)
    if not shape:
        return f"jnp.sin({x})"
    axis = r.axis(x)
    letters = "abcd"[: len(shape)]
    summed = letters[axis]
    kept = letters.replace(summed, "")
    n = shape[axis]
    start = r.number(0, 3)
    by = f"e[{start}:{n + start}]"
    options = [
        f"jnp.einsum('{letters},{summed}->{kept}', {x}, {by})",
        f"jnp.einsum('{letters},x{summed}->{kept}x', {x}, f[:, :{n}])",
        f"jnp.tensordot({by}, {x}, axes=(0, {axis}))",
        f"jnp.take({x}, ids % {n}, {axis})",
        f"{x}[ids % {shape[0]}]",
        f"{x}[i % {shape[0]}]",
        f"lax.dynamic_slice_in_dim({x}, i % {n}, 1, {axis})",
        f"{x}.sum({axis})",
        f"jnp.tanh({x} @ e[:{shape[-1]}])",
        f"f[:, :{shape[-2] if len(shape) > 1 else n}] @ {x}",
        f"jax.vmap(lambda i: {x}[i])(ids % {shape[0]})",
        f"jax.nn.one_hot(ids % {shape[0]}, {shape[0]}, dtype={x}.dtype) @ {x}",
    ]
    if len(shape) == 3:
        square = "jnp.tanh(a @ h[:a.shape[-1]]).sum() + h"
        options += [
            f"lax.scan(lambda h, a: ({square}, a @ h[:a.shape[-1]]), e[:9], {x})[1]",
            f"jax.vmap(lambda a: a @ e[:{shape[-1]}])({x})",
            f"lax.conv(f[None, :, :16][:, :{shape[1]}], {x}, (1,), 'SAME')",
            f"jnp.einsum('lij,lj->li', {x}, f[:{shape[0]}, :{shape[2]}])",
        ]
    return r.choose(options)


MOVES = (
    *(_make_edit,) * 6,
    *(_rolled,) * 2,
    *(_pad_rank,) * 2,
    *(_sliced,) * 3,
    _turned,
    _reshaped,
    _reshaped,
    _repeated,
    _scaled,
    _mixed,
    _programs,
    _multiplied,
    _met,
)
MEETINGS = (_meeting,)


@functools.cache
def _shapes():
    with jax.enable_x64(True):
        return {
            name: jax.ShapeDtypeStruct(x.shape, jnp.float64)
            for name, x in parameters().items()
        }


def source(seed):
    """A random program."""
    with jax.enable_x64(True):
        return Writer(seed, _shapes()).source


def _compiled(source):
    space = dict(NAMES)
    exec(source, space)
    program = space["program"]
    return lambda params: program(**params, **INDICES)


def faults(source):
    """The differences in value and gradients between a program and its dense
    version."""
    with jax.enable_x64(True):
        params = parameters()
        fn = _compiled(source)

        def loss_and_gradient(fn):
            return jax.value_and_grad(lambda params: _scalar(fn(params)))

        adapted = loss_and_gradient(lorax.lora(fn, on_materialise="allow"))
        reference = loss_and_gradient(lambda params: fn(dense_of(params)))
        got, expected = (_evaluated(fn, params) for fn in (adapted, reference))
    return list(_differences(got, expected, "float32" in source))


def _scalar(outputs):
    """A sum over all outputs with a different coefficient for every entry."""
    flat = jnp.concatenate([x.astype(jnp.float64).ravel() for x in outputs])
    signs = np.cos(1.0 + 3.7 * np.arange(flat.size))
    return (flat * (signs + 0.25 * flat)).sum()


def _evaluated(fn, params):
    jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(params)
    outputs = interpreter.run(jaxpr, *jax.device_get(jax.tree.leaves(params)))
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)


def _differences(got, expected, has_cast):
    tolerance = TOLERANCE_CAST if has_cast else TOLERANCE
    with_paths = jax.tree_util.tree_leaves_with_path(got)
    sizes = [np.abs(x).max(initial=0) for x in jax.tree.leaves(expected)]
    scale = max(1.0, *sizes)
    for (path, x), y in zip(with_paths, jax.tree.leaves(expected), strict=True):
        if not np.allclose(x, y, rtol=0, atol=tolerance * scale):
            name = jax.tree_util.keystr(path)
            yield f"{name} differs by {np.abs(x - y).max():.1e} of {scale:.1e}"
