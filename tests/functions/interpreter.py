"""Runs traced programs with NumPy. Nothing is compiled, so hundreds of small programs
take seconds."""

import itertools

import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np

from eqx_lorax._shared import compat as _compat


def run(jaxpr, *arrays):
    """The outputs of a closed jaxpr."""
    inner, consts = jaxpr.jaxpr, jaxpr.consts
    known = dict(zip([*inner.constvars, *inner.invars], [*consts, *arrays]))

    def read(x):
        return np.asarray(x.val if isinstance(x, jec.Literal) else known[x])

    for equation in inner.eqns:
        outputs = _evaluate(equation, [read(x) for x in equation.invars])
        assert len(outputs) == len(equation.outvars)
        for variable, x in zip(equation.outvars, outputs):
            aval = variable.aval
            assert (np.shape(x), np.result_type(x)) == (aval.shape, aval.dtype), (
                equation
            )
            known[variable] = x
    return [read(x) for x in inner.outvars]


def _evaluate(equation, values):
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(params, values)
    if name == "cond":
        index, *operands = values
        branches = params["branches"]
        return _run(branches[int(np.clip(index, 0, len(branches) - 1))], operands)
    if name == "optimization_barrier":
        return values
    if name in PARTS:
        return PARTS[name](*values, **params)
    inner = params.get("call_jaxpr", params.get("jaxpr"))
    if inner is not None and name != "while":
        return _run(inner, values)
    rule = RULES.get(name)
    if rule is not None:
        return [np.asarray(rule(*values, **params), equation.outvars[0].aval.dtype)]
    # Rare primitives may be compiled.
    outputs = equation.primitive.bind(*map(jnp.asarray, values), **params)
    outputs = outputs if equation.primitive.multiple_results else [outputs]
    return [np.asarray(x) for x in outputs]


def _run(jaxpr, values):
    return run(_compat.close(jaxpr), *values)


def _scan(params, values):
    consts, carried = _compat.scan_counts(params, len(values))
    consts, carry, xs = np.split(np.arange(len(values)), [consts, consts + carried])
    consts, carry, xs = ([values[i] for i in part] for part in (consts, carry, xs))
    steps = range(params["length"])
    found = {}
    for i in reversed(steps) if params["reverse"] else steps:
        outputs = _run(params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry, found[i] = outputs[: len(carry)], outputs[len(carry) :]
    return [*carry, *(np.stack(ys) for ys in zip(*(found[i] for i in steps)))]


def _dot_general(x, y, *, dimension_numbers, **_):
    (x_summed, y_summed), (x_batch, y_batch) = dimension_numbers
    x_labels = list(range(x.ndim))
    y_labels = list(range(x.ndim, x.ndim + y.ndim))
    for i, j in zip([*x_summed, *x_batch], [*y_summed, *y_batch]):
        y_labels[j] = i
    out = [*x_batch]
    out += [i for i in range(x.ndim) if i not in {*x_summed, *x_batch}]
    out += [y_labels[j] for j in range(y.ndim) if j not in {*y_summed, *y_batch}]
    return np.einsum(x, x_labels, y, y_labels, out)


def _broadcast_in_dim(x, *, shape, broadcast_dimensions, **_):
    expanded = [1] * len(shape)
    for i, dimension in enumerate(broadcast_dimensions):
        expanded[dimension] = x.shape[i]
    return np.broadcast_to(x.reshape(expanded), shape)


def _slice(x, *, start_indices, limit_indices, strides):
    strides = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, strides))]


def _pad(x, value, *, padding_config):
    for axis, (low, high, interior) in enumerate(padding_config):
        size = x.shape[axis]
        full = max(low, 0) + size + (size - 1) * interior * (size > 0) + max(high, 0)
        out = np.full([*x.shape[:axis], full, *x.shape[axis + 1 :]], value, x.dtype)
        inside = (slice(None),) * axis
        stop = max(low, 0) + (size - 1) * (interior + 1) + 1 if size else max(low, 0)
        out[(*inside, slice(max(low, 0), stop, interior + 1))] = x
        x = out[(*inside, slice(max(-low, 0), full - max(-high, 0)))]
    return x


def _window(shape, starts, sizes):
    starts = [int(np.clip(s, 0, n - k)) for s, n, k in zip(starts, shape, sizes)]
    return tuple(slice(s, s + k) for s, k in zip(starts, sizes))


def _dynamic_slice(x, *starts, slice_sizes):
    return x[_window(x.shape, starts, slice_sizes)]


def _dynamic_update_slice(x, update, *starts):
    out = x.copy()
    out[_window(x.shape, starts, update.shape)] = update
    return out


def _windows(shape, indices, sizes, index_map, batching, indices_batching, mode):
    """For each row of indices, the window that it selects, and whether the whole window
    is within an array of `shape`."""
    for at in itertools.product(*map(range, indices.shape[:-1])):
        starts = [0] * len(shape)
        for column, axis in enumerate(index_map):
            starts[axis] = int(indices[(*at, column)])
        for axis, of_indices in zip(batching, indices_batching):
            starts[axis] = at[of_indices]
        inside = all(0 <= s <= n - k for s, n, k in zip(starts, shape, sizes))
        is_clipped = "CLIP" in str(mode) or "PROMISE" in str(mode)
        yield at, _window(shape, starts, sizes), inside or is_clipped


def _gather(x, indices, *, dimension_numbers, slice_sizes, mode, fill_value, **_):
    numbers = dimension_numbers
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [size for i, size in enumerate(slice_sizes) if i not in gone]
    out = np.empty([*indices.shape[:-1], *kept], x.dtype)
    batching = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    where = numbers.start_index_map, *batching, mode
    missing = np.nan if fill_value is None else fill_value
    for at, window, inside in _windows(x.shape, indices, slice_sizes, *where):
        out[at] = x[window].reshape(kept) if inside else missing
    offsets = numbers.offset_dims
    order = iter(range(indices.ndim - 1))
    of_offset = {dim: indices.ndim - 1 + i for i, dim in enumerate(offsets)}
    return out.transpose([of_offset.get(i, None) if i in of_offset else next(order)
                          for i in range(out.ndim)])  # fmt: skip


def _scatter(combine):
    def rule(x, indices, updates, *, dimension_numbers, mode, **_):
        numbers = dimension_numbers
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        window_dims = numbers.update_window_dims
        other = [i for i in range(updates.ndim) if i not in window_dims]
        updates = updates.transpose([*other, *window_dims])
        sizes = iter(updates.shape[len(other) :])
        sizes = [1 if i in gone else next(sizes) for i in range(x.ndim)]
        batching = numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
        where = numbers.scatter_dims_to_operand_dims, *batching, mode
        out = x.copy()
        for at, window, inside in _windows(x.shape, indices, sizes, *where):
            if inside:
                out[window] = combine(out[window], updates[at].reshape(sizes))
        return out

    return rule


def _select_n(which, *cases):
    return np.choose(which.astype(int), cases) if which.ndim else cases[int(which)]


def _iota(*_, dtype, shape, dimension, **__):
    along = np.arange(shape[dimension], dtype=dtype)
    return _broadcast_in_dim(along, shape=shape, broadcast_dimensions=[dimension])


def _reduced(fn):
    return lambda x, *, axes, **_: fn(x, axis=tuple(axes))


def _plain(fn):
    return lambda *values, **_: fn(*values)


def _split(x, *, sizes, axis):
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _unstack(x, *, axis, **_):
    return list(np.moveaxis(x, axis, 0))


PARTS = {"split": _split, "unstack": _unstack}

RULES = {
    "add": _plain(np.add),
    "add_any": _plain(np.add),
    "and": _plain(np.bitwise_and),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "copy": _plain(np.array),
    "copy_p": _plain(np.array),
    "cos": _plain(np.cos),
    "div": _plain(lambda x, y: x / y if x.dtype.kind in "fc" else x // y),
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "eq": _plain(np.equal),
    "gather": _gather,
    "ge": _plain(np.greater_equal),
    "gt": _plain(np.greater),
    "iota": _iota,
    "le": _plain(np.less_equal),
    "lorax_product_with_factor": _plain(lambda x, factor: x @ factor.T),
    "lt": _plain(np.less),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "mul": _plain(np.multiply),
    "ne": _plain(np.not_equal),
    "neg": _plain(np.negative),
    "not": _plain(np.invert),
    "or": _plain(np.bitwise_or),
    "pad": _pad,
    "real": _plain(np.real),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_sum": _reduced(np.sum),
    "rem": _plain(np.fmod),
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "scatter": _scatter(lambda x, update: update),
    "scatter-add": _scatter(np.add),
    "scatter_add": _scatter(np.add),
    "select_n": _select_n,
    "sin": _plain(np.sin),
    "slice": _slice,
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "stack": lambda *xs, axis: np.stack(xs, axis),
    "stop_gradient": _plain(np.asarray),
    "sub": _plain(np.subtract),
    "tanh": _plain(np.tanh),
    "tile": lambda x, *, reps: np.tile(x, reps),
    "transpose": lambda x, *, permutation: x.transpose(permutation),
}
