"""The pass over the data."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .._functions import lora
from .._methods import check_key
from .._modules import PerTarget
from .._shared import follow, is_array, is_inexact, list_some, PyTree
from .._trees import Filter, LoraSpec, SpecValue
from .calibration import Calibration
from .records import GradientRecord, InputRecord
from .targets import (
    as_jax,
    Fixed,
    list_measured,
    make_fixed,
    make_zeros,
    Measured,
    put_probes,
    put_watches,
    resolve_uses,
    Zeros,
)


Gathered: TypeAlias = Literal["inputs", "gradients"]
"""What `lorax.calibrate` gathers of each weight."""


def calibrate(
    fn: Callable[[Any, Any], Any],
    model: PyTree,
    batches: Iterable[Any],
    filter: Filter = None,
    *,
    exclude: Filter = None,
    rank: PerTarget[int | LoraSpec | None] = None,
    spec: PyTree[SpecValue] | None = None,
    gather: Gathered | Sequence[Gathered] = ("inputs", "gradients"),
    sketch: int | None = None,
    key: PRNGKeyArray | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Runs a model over some data, before it is adapted, and gathers what starts and
    ranks of its adapters can be derived from.

    !!! example

        ```python
        calibration = lorax.calibrate(loss, model, batches, ["query", "value"], key=key)
        model = lorax.loraify(
            model, ["query", "value"], init=calibration.eva(), key=key
        )
        ```

    Of the inputs `x` of each weight, which are the activations that it is multiplied
    with, that is `Σ x xᵀ`. Of its gradient it is the products with two random
    matrices, from which the leading singular vectors are found. Neither the activations
    nor the gradient itself are kept. The data are read once, and what is gathered does
    not grow with them.

    **Arguments:**

    - `fn`: Called as `fn(model, batch)`. It has to return a scalar loss, or a tuple
        whose first entry is one, to gather gradients. For inputs alone any forward pass
        will do, and no backward pass is run. As in `jax.jit`, its Python control flow
        cannot depend on the values of arrays. Whatever `lorax.lora` can take apart is
        measured: `vmap`, `scan` over stacked layers, `checkpoint`, `cond`; but no
        `while_loop`, which has no derivative.
    - `model`: A model, or with `spec` any pytree of parameters.
    - `batches`: The batches: pytrees. There is one compilation for each of their
        shapes.
    - `filter`, `exclude`: What is measured, as in `lorax.loraify`.
    - `rank`: The ranks to come, as in `lorax.loraify`. Their axes have to be those. Of
        gradients, the directions for twice the rank are kept.
    - `spec`: For trees of parameters, instead of the three above: as in
        `lorax.init_lora`.
    - `gather`: `"inputs"`, `"gradients"` or both. EVA, CorDA and
        `Calibration.allocate_ranks` need inputs, LoRA-GA needs gradients.
    - `sketch`: Of inputs of a larger size only the product `Σ x xᵀ Ω` with a random
        matrix of so many columns is kept, `size · sketch` numbers instead of
        `size²`. Use twice the largest rank or more. By default all is kept.
    - `key`: A `jax.random.key` for random matrices. Only inputs without a sketch need
        none.
    - `progress`: Whether to show a progress bar, which needs `tqdm`. By default there
        is one on terminals where `tqdm` is installed.

    **Returns:**

    A `lorax.Calibration`, with everything in float32 or wider. A stack of layers has
    statistics for each layer.

    **Raises:**

    `TypeError` if `batches` is a single batch. `ValueError` if there are no batches; if
    a target is not used in `fn`, or not in a product, or multiplied from both sides; if
    `fn` returns no loss; if an option is out of range; and as `lorax.loraify` does.

    ??? cite

        The gradients: [Practical sketching algorithms for low-rank matrix
        approximation](https://arxiv.org/abs/1609.00048), algorithm 4.
    """
    if is_array(batches) or isinstance(batches, str | Mapping):
        raise TypeError(
            f"`batches` is one {type(batches).__name__}, not several batches. Pass a "
            "list of batches, `[batch]`, or a generator."
        )
    kinds = _check_kinds(gather)
    _check_sketch(sketch)
    if sketch is not None or "gradients" in kinds:
        if key is None:
            raise ValueError(
                "`key=None`, but gradients and sketches need random matrices. Pass "
                "`key=jax.random.key(0)`."
            )
        check_key(key)
    model = as_jax(model)
    measured = list_measured(model, filter, exclude, spec, rank)
    bar = follow(batches, progress, title="Calibrating", unit="batch")
    batch = next(bar, _END)
    if batch is _END:
        raise ValueError("`batches` is empty. Pass at least one batch of data.")
    measured = _watch(fn, model, batch, measured, kinds)
    fixed = {
        one.name: make_fixed(
            one,
            inputs="inputs" in kinds,
            gradients="gradients" in kinds,
            sketch=sketch,
            key=key,
        )
        for one in measured
    }
    step = _make_step(fn, measured, kinds)
    gathered, count = None, 0
    while batch is not _END:
        found = step(fixed, model, as_jax(batch))
        gathered = found if gathered is None else _add(gathered, found)
        count += 1
        batch = next(bar, _END)
    assert gathered is not None
    return _to_calibration(measured, fixed, gathered, count)


_END: Any = object()


def _check_kinds(gather: Any) -> tuple[Gathered, ...]:
    kinds: tuple[Any, ...] = (gather,) if isinstance(gather, str) else tuple(gather)
    if not kinds or not {*kinds} <= {*get_args(Gathered)}:
        raise ValueError(
            f"`gather={gather!r}` must be 'inputs', 'gradients' or a list of these."
        )
    return kinds


def _check_sketch(sketch: Any) -> None:
    if sketch is not None and (not isinstance(sketch, int) or sketch < 1):
        raise ValueError(
            f"`sketch={sketch!r}` must be a positive number of columns, such as twice "
            "the rank, or `None`."
        )


def _watch(
    fn: Any,
    model: Any,
    batch: Any,
    measured: Sequence[Measured],
    kinds: Sequence[Gathered],
) -> list[Measured]:
    """Traces the function once, to see how it uses the weights and what it returns."""
    watched, watches = put_watches(model, measured)
    run = lora(fn, on_materialise="allow")
    out = eqx.filter_eval_shape(run, watched, as_jax(batch))
    found = resolve_uses(measured, watches, "inputs" in kinds)
    if "gradients" in kinds:
        loss: Any = out[0] if isinstance(out, tuple) and out else out
        is_real = is_inexact(loss) and not jnp.iscomplexobj(loss)
        if not is_real or loss.shape != ():
            kind = f"{loss.dtype} {loss.shape}" if is_inexact(loss) else type(loss)
            raise ValueError(
                "To gather gradients `fn` must return a scalar loss, or a tuple that "
                f"begins with one, not {kind}. For the inputs alone pass "
                "`gather='inputs'`."
            )
    return found


def _make_step(
    fn: Any, measured: Sequence[Measured], kinds: Sequence[Gathered]
) -> Callable[..., dict[str, Zeros]]:
    run = lora(fn, on_materialise="allow")

    @eqx.filter_jit
    def step(fixed: Mapping[str, Fixed], model: Any, batch: Any) -> Any:
        def objective(zeros: Mapping[str, Zeros]) -> Array:
            out = run(put_probes(model, measured, zeros, fixed), batch)
            if "gradients" in kinds:
                return out[0] if isinstance(out, tuple) else out
            # Only that each result counts matters, not how much.
            leaves = [x for x in jax.tree.leaves(out) if is_inexact(x)]
            sums = [jnp.sum(jnp.real(x)).astype(jnp.float32) for x in leaves]
            return sum(sums, start=jnp.zeros((), jnp.float32))

        # Made here, so that they take no memory.
        zeros = {
            one.name: make_zeros(one, fixed[one.name], "inputs" in kinds)
            for one in measured
        }
        try:
            return jax.grad(objective)(zeros)
        except ValueError as error:
            if "while_loop" in str(error):
                error.add_note(_LOOP)
            raise

    return step


_LOOP = (
    "`lorax.calibrate` measures by a derivative, which a `while_loop` has not. Pass a "
    "function without it, such as a loss in the place of a generation."
)


@functools.partial(jax.jit, donate_argnums=0)
def _add(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.add, x, y)


def _to_calibration(
    measured: Sequence[Measured],
    fixed: Mapping[str, Fixed],
    gathered: Mapping[str, Zeros],
    count: int,
) -> Calibration:
    inputs: dict[str, InputRecord] = {}
    gradients: dict[str, GradientRecord] = {}
    for one in measured:
        found, random = gathered[one.name], fixed[one.name]
        if found.sums is not None:
            inputs[one.name] = _to_input_record(one, found.sums, random.sketch)
        if found.b is not None and found.a is not None:
            gradients[one.name] = GradientRecord(
                _as_matrices(one, found.b / count, left=one.rows),
                _as_matrices(one, found.a / count, right=one.columns),
                _as_matrices(one, random.b, left=one.rows),
                one.inputs,
            )
    unseen = [
        name
        for name, record in inputs.items()
        if not jax.device_get(record.count).all()
    ]
    if unseen:
        raise ValueError(
            f"No result of `fn` depends on {list_some(unseen, 5)}, as far as "
            "derivatives tell: there is a `stop_gradient`, or results are integers. "
            "Return what they are computed from, or leave these out, with `exclude`."
        )
    return Calibration(inputs, gradients)


def _to_input_record(one: Measured, sums: Any, sketch: Array | None) -> InputRecord:
    axes = one.columns if one.inputs == "columns" else one.rows
    size = sums.mean.size // max(1, sums.totals.size // 2)
    return InputRecord(
        sums.totals[..., 0],
        sums.totals[..., 1],
        sums.mean.reshape(*one.batch, size),
        sums.product.reshape(*one.batch, size, -1),
        None if sketch is None else _as_matrices(one, sketch, left=axes),
        one.inputs,
    )


def _as_matrices(
    one: Measured, x: Any, left: Sequence[int] = (), right: Sequence[int] = ()
) -> Array:
    """An array with one other axis after these axes of the weight, or before them."""
    batch = len(one.batch)
    if left:
        return x.reshape(*one.batch, -1, x.shape[-1])
    return x.reshape(*one.batch, x.shape[batch], -1)
