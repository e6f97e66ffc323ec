"""Modules whose Python is cheap do all that Equinox's do."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import eqx_lorax as lorax


class Plain(eqx.Module):
    """With the methods of `lorax.LoraWeight` as Equinox binds them."""

    view = lorax.LoraWeight.view
    materialise = lorax.LoraWeight.materialise


@pytest.fixture
def linear(getkey):
    return eqx.nn.Linear(3, 4, key=getkey())


@pytest.fixture
def layer(linear, getkey):
    return lorax.loraify(linear, rank=2, key=getkey())


def list_calls(fn):
    """The names of the Python functions that a call runs."""
    names = []

    def note(frame, event, arg):
        if event == "call":
            names.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        fn()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize("name", ["view", "materialise"])
def test_bound_methods_are_those_of_equinox(layer, name):
    bound = getattr(layer.weight, name)
    like = getattr(Plain(), name)
    assert type(bound) is type(like)
    assert bound.__self__ is layer.weight
    assert vars(bound) | {"__self__": None} == vars(like) | {"__self__": None}
    assert jax.tree.leaves(bound) == jax.tree.leaves(layer.weight)
    assert bound == getattr(layer.weight, name)


def test_bound_methods_go_through_transformations(layer):
    weight = layer.weight
    dense = eqx.filter_jit(weight.materialise)()
    assert jnp.allclose(dense, weight.materialise())

    @jax.jit
    def run(method):
        return method()

    assert jnp.allclose(run(weight.materialise), dense)


def test_a_class_still_has_functions_and_abstract_methods():
    assert lorax.LoraWeight.view.__name__ == "view"
    with pytest.raises(TypeError, match="factored"):
        lorax.AbstractLoraWeight()  # pyright: ignore[reportAbstractUsage]


def test_flattening_looks_at_attributes_of_the_module_alone(linear, layer):
    def count_looks(tree):
        return list_calls(lambda: jax.tree.structure(tree)).count("__getattribute__")

    # Two modules more, but not two as slow as those of Equinox.
    assert count_looks(layer) == count_looks(linear) > 0


@pytest.mark.own_errors
def test_an_eager_call_runs_little_python(linear, layer):
    x = jnp.ones(3)
    linear(x), layer(x)  # compiles
    calls = [len(list_calls(lambda: module(x))) for module in (linear, layer)]
    assert calls[1] < 4 * calls[0]
