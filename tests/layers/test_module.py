"""An adapted module behaves like the plain one for every kind of access."""

import collections.abc
import functools
import inspect
import operator
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, is_weight, trained

import eqx_lorax as lorax


def normal(*shape, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=shape), jnp.float32)


X = normal(4, seed=5)
X_KEY = jax.random.key(9)


class Everything(eqx.Module):
    """Uses its matrix in every way that Python has."""

    kernel: jax.Array
    rows: list[eqx.nn.Linear]
    width: int = eqx.field(static=True, default=4)
    factor: float = eqx.field(converter=float, default=2)

    sign = -1

    def __len__(self):
        return self.kernel.shape[0]

    def __getitem__(self, index):
        return self.rows[index] if isinstance(index, str) else self.kernel[index]

    def __iter__(self):
        for i in range(len(self)):
            yield jnp.sin(self.kernel[i])

    def __contains__(self, x):
        return x in range(len(self))

    def __bool__(self):
        return self.kernel.shape[0] == 3

    def __matmul__(self, x):
        return jnp.matmul(self.kernel, x)

    def __rmatmul__(self, x):
        return jnp.matmul(x, self.kernel)

    def __add__(self, x):
        return jnp.dot(self.kernel, X) + x if eqx.is_array_like(x) else NotImplemented

    def __neg__(self):
        return jnp.dot(self.kernel, -X)

    def __pos__(self):
        return self

    def __lt__(self, x):
        return jnp.dot(self.kernel, X) < x

    def __eq__(self, other):
        return self.width == other.width

    def __hash__(self):
        return self.width

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    @eqx.filter_jit
    def jitted(self, x, *, times=1):
        return times * jnp.matmul(self.kernel, x)

    @eqx.filter_checkpoint
    def checkpointed(self, x):
        return jnp.tanh(jnp.matmul(self.kernel, x))

    @eqx.filter_vmap(in_axes=(None, 0))
    def mapped(self, x):
        return jnp.dot(self.kernel, X) * x

    @jax.jit
    def compiled(self, x):
        return jnp.matmul(self.kernel, x)

    @jax.named_scope("scoped")
    def scoped(self, x):
        return jnp.matmul(self.kernel, x)

    @eqx.filter_grad
    def gradient(self, x):
        return jnp.sum(jnp.sin(jnp.matmul(self.kernel, x)))

    def method(self, x, fn=2.0, layer=0.0):
        return jnp.matmul(self.kernel, x) * fn + layer

    twice = functools.partialmethod(method, fn=4.0)

    @functools.singledispatchmethod
    def dispatched(self, x):
        return jnp.matmul(self.kernel, jnp.full(4, x))

    @dispatched.register
    def _(self, x: str):
        return len(x)

    def generated(self):
        for row in self.rows:
            yield row(X)

    def named(self):
        return {"a": jnp.dot(self.kernel, X)}.values()

    def closure(self):
        return lambda x: jnp.matmul(self.kernel, x)

    def jitted_closure(self):
        return jax.jit(lambda x: jnp.matmul(self.kernel, x))

    def biased(self, x):
        return eqx.tree_at(lambda m: m.factor, self, x)

    @classmethod
    def name(cls):
        return cls.__name__

    @staticmethod
    def double(x):
        return 2 * x

    @property
    def total(self):
        return jnp.sum(jnp.dot(self.kernel, X))

    @property
    def size(self):
        return self.kernel.size

    @property
    def alias(self):
        return self.method

    @property
    def jitted_alias(self):
        return self.jitted

    @property
    def activation(self):
        return jax.nn.relu

    @property
    def nothing(self):
        return None

    @functools.cached_property
    def cached(self):
        return jnp.cos(jnp.dot(self.kernel, X))


class Old(eqx.Module):
    """Python derives iteration and `in` from `__len__` and `__getitem__`."""

    kernel: jax.Array

    def __len__(self):
        return self.kernel.shape[0] - 3

    def __getitem__(self, i):
        if i >= 3:
            raise IndexError(i)
        return jnp.dot(self.kernel[i], X)


class Plain(eqx.Module):
    """A module without special methods."""

    kernel: jax.Array


class Arrays(eqx.Module):
    """Acts as an array."""

    kernel: jax.Array

    def __jax_array__(self):
        return jnp.tanh(self.kernel)

    def __array__(self, dtype=None, copy=None):
        return np.full(3, 7, np.int8)


class Delegating(eqx.Module):
    """Has the attributes of another object."""

    kernel: jax.Array

    def __getattr__(self, name):
        if name == "kernel" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(jnp.dot(self.kernel, X), name)


MODULES = {
    "everything": Everything(
        normal(3, 4), [eqx.nn.Linear(4, 2, key=jax.random.key(0))]
    ),
    "old": Old(normal(3, 4)),
    "plain": Plain(normal(3, 4)),
    "arrays": Arrays(normal(3, 4)),
    "delegating": Delegating(normal(3, 4)),
    "linear": eqx.nn.Linear(4, 3, key=jax.random.key(1)),
}


def enter(m):
    with m as entered:
        return type(m) is type(entered), entered @ X


ASKS = {
    "everything": {
        "len": len,
        "[]": lambda m: m[1],
        "[::]": lambda m: m[0:2],
        "iteration": lambda m: [x * 2 for x in m],
        "unpacking": lambda m: (lambda a, b, c: a + b - c)(*m),
        "in": lambda m: (1 in m, 7 in m),
        "bool": lambda m: bool(m),
        "not": lambda m: not m,
        "@": lambda m: m @ X,
        "r@": lambda m: X[:3] @ m,
        "r@ of NumPy": lambda m: np.asarray(X[:3]) @ m,
        "+": lambda m: m + 1.0,
        "-": lambda m: -m,
        "pos": lambda m: (+m).width,
        "<": lambda m: m < 0.1,
        "==": lambda m: (m == m, m != m),
        "hash": hash,
        "with": enter,
        "filter_jit": lambda m: m.jitted(X, times=3.0),
        "filter_checkpoint": lambda m: m.checkpointed(X),
        "filter_vmap": lambda m: m.mapped(X),
        "jax.jit": lambda m: m.compiled(X),
        "named_scope": lambda m: m.scoped(X),
        "method": lambda m: m.method(X, layer=1.0, fn=3.0),
        "method is a pytree": lambda m: eqx.filter_jit(m.method)(X),
        "partialmethod": lambda m: m.twice(X, layer=1.0),
        "singledispatch": lambda m: (m.dispatched(2.0), m.dispatched("abc")),
        "generator": lambda m: list(m.generated()),
        "view": lambda m: list(m.named()),
        "closure": lambda m: m.closure()(X),
        "jitted closure": lambda m: m.jitted_closure()(X),
        "changed": lambda m: m.biased(3.0) @ X,
        "changed field": lambda m: m.biased(3.0).factor,
        "classmethod": lambda m: m.name(),
        "staticmethod": lambda m: m.double(3),
        "property": lambda m: m.total,
        "property of a size": lambda m: m.size,
        "property of a method": lambda m: m.alias(X),
        "property of filter_jit": lambda m: m.jitted_alias(X),
        "property of a function": lambda m: m.activation is jax.nn.relu,
        "property of None": lambda m: m.nothing,
        "cached_property": lambda m: (m.cached, m.cached),
        "fields": lambda m: (m.width, m.factor, m.sign),
        "signature": lambda m: str(inspect.signature(m.method)),
        "names": lambda m: m.method.__name__,
        "has": lambda m: [
            hasattr(m, x) for x in ("__len__", "absent", "__jax_array__")
        ],
        "is": lambda m: isinstance(m, Everything | collections.abc.Sized),
    },
    "old": {
        "iteration": lambda m: list(m),
        "in": lambda m: 7.5 in np.asarray(m[0]),
        "bool": lambda m: bool(m),
        "len": len,
    },
    "plain": {
        "bool": lambda m: (bool(m), not m),
        "has": lambda m: [
            hasattr(m, x) for x in ("__len__", "__iter__", "__array__", "__getitem__")
        ],
        "==": lambda m: m == m,
        "callable of it": lambda m: callable(m.kernel),
    },
    "arrays": {
        "jnp": lambda m: jnp.exp(m),
        "np": lambda m: np.asarray(m),
        "@": lambda m: X[:3] @ m,
        "@ of NumPy": lambda m: np.arange(3) @ m,
    },
    "delegating": {"attribute": lambda m: m.real},
    "linear": {
        "bool": lambda m: bool(m),
        "fields": lambda m: (m.in_features, m.use_bias),
        "call": lambda m: m(X),
        "np": lambda m: (np.asarray(m).dtype.kind, np.array([m, m], object).shape),
        "has": lambda m: [hasattr(m, x) for x in ("__len__", "__iter__", "absent")],
    },
}

every_ask = pytest.mark.parametrize(
    "name, ask", [(name, ask) for name, asks in ASKS.items() for ask in asks]
)


def make(name) -> Any:
    """A module, and the same module with an adapted array."""
    module = MODULES[name]
    if name == "arrays":  # `loraify` adapts modules that compute with such a module.
        weight = lorax.LoraWeight(module.kernel, jnp.ones((3, 2)), jnp.ones((2, 4)))
        adapted = lorax.LoraModule(eqx.tree_at(lambda m: m.kernel, module, weight))
        return lorax.unloraify(adapted), adapted
    array = "weight" if name == "linear" else "kernel"
    adapted = trained(lorax.loraify([module], array, rank=2, key=jax.random.key(2)))
    return lorax.unloraify(adapted)[0], adapted[0]


def quiet(fn, *args):
    with warnings.catch_warnings():
        # Some of them need the dense matrix.
        warnings.simplefilter("ignore", lorax.MaterialiseWarning)
        return fn(*args)


@every_ask
def test_values(name, ask):
    plain, adapted = make(name)
    assert type(adapted) in (lorax.LoraModule, lorax.LoraLinear)
    ask = ASKS[name][ask]
    expected, found = ask(plain), quiet(ask, adapted)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        if isinstance(y, jax.Array | np.ndarray):
            assert isinstance(x, jax.Array | np.ndarray) and x.dtype == y.dtype
            if y.dtype == bool:
                assert (x == y).all()
            else:
                assert_close(x, y)
        else:
            assert type(x) is type(y) and x == y


def total(module, ask):
    leaves = jax.tree.leaves(quiet(ask, module))
    return sum(
        (jnp.sum(jnp.sin(x)) for x in leaves if eqx.is_inexact_array(x)), jnp.zeros(())
    )


DIFFERENTIABLE = ["[]", "iteration", "@", "r@", "+", "-", "filter_jit"]
DIFFERENTIABLE += ["filter_checkpoint", "filter_vmap", "jax.jit", "method", "changed"]
DIFFERENTIABLE += ["partialmethod", "closure", "property", "property of a method"]


@pytest.mark.parametrize("ask", DIFFERENTIABLE)
def test_gradients(ask):
    _, adapted = make("everything")
    ask = ASKS["everything"][ask]

    def dense(b, a):
        w = adapted.kernel
        module = eqx.tree_at(lambda m: m.kernel, adapted.wrapped, w.w + w.scale * b @ a)
        return total(module, ask)

    found = lorax.filter_grad(total)(adapted, ask).kernel
    expected = jax.grad(dense, (0, 1))(adapted.kernel.b, adapted.kernel.a)
    assert_close((found.b, found.a), expected)


NOT_THERE = {
    "len": len,
    "iter": iter,
    "next": next,
    "[]": lambda m: m[0],
    "in": lambda m: 0 in m,
    "reversed": reversed,
    "+": lambda m: m + 1,
    "r+": lambda m: 1 + m,
    "@": operator.matmul,
    "@ of arrays": lambda m: m @ X,
    "r@ of arrays": lambda m: X @ m,
    "<": lambda m: m < m,
    "-": lambda m: -m,
    "abs": abs,
    "int": int,
    "float": float,
    "call": lambda m: m(X),
    "|": lambda m: m | m,
    "jnp": jnp.exp,
}


@pytest.mark.parametrize("ask", NOT_THERE)
def test_what_the_module_has_not(ask):
    plain, adapted = make("plain")
    for module in (plain, adapted):
        with pytest.raises(TypeError):
            NOT_THERE[ask](module)
    with pytest.raises((TypeError, AttributeError)):
        with adapted:
            pass
    with pytest.raises(AttributeError, match="absent"):
        adapted.absent


def test_the_other_side_has_its_say():
    class Other:
        def __radd__(self, module):
            return module.kernel.shape

    plain, adapted = make("plain")
    assert adapted + Other() == plain + Other() == (3, 4)


class Holder(eqx.Module):
    """Holds layers and an array of its own."""

    layers: list[eqx.nn.Linear]
    table: jax.Array

    def __getitem__(self, i):
        return self.layers[i]

    def __len__(self):
        return len(self.layers)

    @property
    def first(self):
        return self.layers[0]

    @property
    def own(self):
        return self.table

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return jnp.matmul(self.table, x)


def test_what_is_held_keeps_its_adapters():
    layers = [eqx.nn.Linear(4, 4, key=key) for key in jax.random.split(X_KEY)]
    model = lorax.loraify(
        [Holder(layers, normal(3, 4))], ["0", "table"], rank=2, key=X_KEY
    )
    (model,) = trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (model[0], model.first, next(iter(model)), [*model][0]):
            assert type(layer) is lorax.LoraLinear
            assert layer.weight.b is model.layers[0].weight.b
        assert model.own is model.table and is_weight(model.own)
        assert is_weight(model.first.weight)
        assert_close(model(X), lorax.unloraify([model])[0](X))
    # `self`, or a changed copy of it, is adapted too.
    _, adapted = make("everything")
    assert +adapted is adapted
    changed = adapted.biased(3.0)
    assert type(changed) is lorax.LoraModule and changed.kernel.b is adapted.kernel.b


def test_fields_are_not_traced(monkeypatch):
    _, adapted = make("everything")
    _, linear = make("linear")

    def traced(*args, **kwargs):
        raise AssertionError("traced")

    monkeypatch.setattr(jax, "make_jaxpr", traced)
    assert (adapted.width, adapted.factor, adapted.sign) == (4, 2.0, -1)
    assert linear.in_features == 4 and linear and not hasattr(linear, "absent")
    assert adapted.double(2) == 4 and adapted.name() == "Everything"
    assert adapted.kernel is adapted.wrapped.kernel and is_weight(adapted.kernel)
    assert adapted.rows[0] is adapted.wrapped.rows[0]


def test_methods_are_pytrees():
    """Like the bound methods of Equinox modules: their arrays are not constants."""
    _, adapted = make("everything")
    assert len(jax.tree.leaves(adapted.method)) == len(jax.tree.leaves(adapted))
    traces = 0

    @eqx.filter_jit
    def call(fn, x):
        nonlocal traces
        traces += 1
        return fn(x)

    for scale in (1.0, 2.0):
        other = lorax.scale(adapted, scale)
        assert_close(call(other.method, X), lorax.unloraify([other])[0].method(X))
    assert traces == 1
    assert_close(lorax.lora(adapted.method)(X), adapted.method(X))


def test_in_the_function_door():
    _, adapted = make("everything")

    def fn(module, x):
        return module.jitted(module @ x @ module) + module.total

    plain = lorax.unloraify([adapted])[0]
    assert_close(lorax.lora(fn)(adapted, X), fn(plain, X))


# Messages


class Sine(eqx.Module):
    kernel: jax.Array

    def __call__(self, x):
        return jnp.sin(self.kernel) @ x

    @property
    def sine(self):
        return jnp.sin(self.kernel)


def test_the_warning_is_for_those_who_adapt():
    (sine,) = lorax.loraify([Sine(normal(3, 4))], "kernel", rank=2, key=X_KEY)
    for use in (lambda: sine(X), lambda: sine.sine):
        with pytest.warns(lorax.MaterialiseWarning) as caught:
            use()
        message = str(caught[0].message)
        assert "`sin`" in message and "Sine" in message and "`exclude`" in message
        assert "warnings.filterwarnings" in message and "on_materialise" not in message
        assert caught[0].filename == __file__
    with pytest.warns(lorax.MaterialiseWarning, match="on_materialise='allow'"):
        lorax.lora(lambda module: jnp.sin(module.kernel))(sine)


class Steered(eqx.Module):
    kernel: jax.Array

    def __call__(self, x, how):
        y = jnp.matmul(self.kernel, x)
        return how(y)


@pytest.mark.parametrize(
    "how",
    (
        lambda y: y if y.sum() > 0 else -y,
        lambda y: float(y.sum()),
        lambda y: int(y.sum()),
        lambda y: np.asarray(y),
        lambda y: y[y > 0],
        lambda y: range(jnp.argmax(y)),
    ),
)
def test_code_that_needs_values(how):
    module = Steered(normal(3, 4))
    module(X, lambda y: y)
    (adapted,) = lorax.loraify([module], "kernel", rank=2, key=X_KEY)
    with pytest.raises((TypeError, IndexError)) as error:
        adapted(X, how)
    (note,) = (note for note in error.value.__notes__ if "traced" in note)
    assert "Steered" in note and "jax.lax.cond" in note and "`exclude`" in note
    with pytest.raises((TypeError, IndexError)) as error:
        lorax.lora(adapted)(X, how)
    (note,) = (note for note in error.value.__notes__ if "traces" in note)
    assert "Steered" not in note
