"""Plans: the memory, the operations and the least time that a training step needs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import optax

from .._methods import check_whole
from .._modules import remove_keys
from .._shared import (
    count_device_bytes,
    count_devices,
    drop_shardings,
    is_array,
    list_arrays,
    local_shape,
    mesh_axes,
    plan_optimizer_state,
    PyTree,
)
from .._training import format_bytes, partition
from .._trees import Filter
from .costs import (
    build_program,
    count_flops,
    count_weight_reads,
    Program,
    StoredWeight,
    Value,
)
from .held import find_held, format_held, HeldArrays


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of device, by the numbers in its datasheet.

    !!! example

        ```python
        h100 = lorax.Accelerator(
            "H100", memory=80e9, flops=989e12, bandwidth=3.35e12, link=900e9
        )
        bound = lorax.plan(loss, model, batch).bound(h100)
        bound.fits, bound.seconds
        ```
    """

    name: str
    """Any name."""
    memory: int | float
    """Bytes of memory."""
    flops: int | float
    """Floating point operations a second, of products in the dtype of the model."""
    bandwidth: int | float
    """Bytes a second between the memory and the processor."""
    link: int | float = math.inf
    """Bytes a second from other devices."""


@dataclasses.dataclass(frozen=True)
class StepBound:
    """The seconds that a training step takes at least on an accelerator: three bounds,
    each as if the step did one thing only."""

    accelerator: Accelerator
    """What the bounds are for."""
    compute: float
    """For computing all products, on all devices at once, at full speed."""
    memory: float
    """For reading the weights of every product, and reading and writing adapters and
    optimizer state once."""
    communication: float
    """For receiving the parts of weights that are gathered, and summing gradients."""
    fits: bool
    """Whether the accelerator has the memory of the plan."""

    @property
    def seconds(self) -> float:
        """The largest of the three: no step is faster."""
        return max(self.compute, self.memory, self.communication)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `lorax.plan` found. Its `str` is a table of sizes, and `table()` also shows
    what is held."""

    devices: int
    """The number of devices."""
    base: int
    """The bytes of all that is frozen, on one device. So are all bytes below."""
    adapters: int
    """The bytes of what is trained."""
    gradients: int
    """The bytes of the gradients."""
    optimizer: int
    """The bytes of the optimizer's state."""
    activations: int
    """The most bytes that are live at once besides these: arrays of the forward pass
    that the backward pass needs, intermediate results, and gathered weights."""
    flops: int
    """The operations of the products of one step, on all devices together."""
    read: int
    """The bytes of weights that the products of one step read on one device."""
    received: int
    """The bytes that one device receives in one step: parts of weights that are
    gathered, and of gradients that are summed over a divided batch."""
    held: tuple[HeldArrays, ...] = dataclasses.field(repr=False)
    """The arrays that make up the activations, largest first."""

    @property
    def total(self) -> int:
        """The bytes of all on one device."""
        parts = (self.base, self.adapters, self.gradients, self.optimizer)
        return sum(parts) + self.activations

    def bound(self, accelerator: Accelerator) -> StepBound:
        """The least time of one step on devices of one kind, and whether it fits.

        **Arguments:**

        - `accelerator`: The kind of the devices.

        **Returns:**

        A `lorax.StepBound`, in seconds.
        """
        moved = self.read + 2 * (self.adapters + self.optimizer)
        return StepBound(
            accelerator,
            compute=self.flops / self.devices / accelerator.flops,
            memory=moved / accelerator.bandwidth,
            communication=self.received / accelerator.link,
            fits=self.total <= accelerator.memory,
        )

    def table(self, *, full: bool = False) -> str:
        """The table as a string, with the arrays that make up the activations below it.

        **Arguments:**

        - `full`: Whether all of them have a line. Otherwise arrays that are less than a
            hundredth of the activations are one line together.
        """
        least = 0 if full else self.activations / 100
        return f"{self}\n\n{format_held(self.held, least)}"

    def __str__(self) -> str:
        names = ("base", "adapters", "gradients", "optimizer", "activations", "total")
        sizes = {name: format_bytes(getattr(self, name)) for name in names}
        where = f"of {self.devices} devices" if self.devices > 1 else "device"
        lines = [f"on one {where}"]
        lines += [f"  {name:<12}{size:>10}" for name, size in sizes.items()]
        return "\n".join([*lines, f"products of a step: {self.flops:.3g} FLOPs"])


def plan(
    loss: Callable[[Any, Any], Any],
    model: PyTree,
    batch: PyTree,
    *,
    also: Filter = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Plan:
    """Plans one training step of an adapted model: what it needs on each device.
    Nothing is computed, nothing is allocated, and no device has to be there.

    !!! example

        ```python
        model = eqx.filter_eval_shape(make_model, key)  # shapes only
        model = lorax.loraify(model, rank=16, key=key)
        print(lorax.plan(loss, model, batch))
        ```

    The bytes of base, adapters, gradients and optimizer state are exact. Of an array
    with a sharding, even of a `jax.sharding.AbstractMesh`, they count the part on one
    device. Activations are the peak of the traced step, as if each equation made an
    array; the page on planning says how near that is. They are divided where the batch
    is. Axes of the mesh that divide weights alone are taken to divide no activations,
    so that the plan is too high there.

    **Arguments:**

    - `loss`: The function `(model, batch) -> scalar` that is trained.
    - `model`: A model with adapters, or any model if `also` is given. Its arrays may
        be `jax.ShapeDtypeStruct`s with or without a sharding.
    - `batch`: A batch for `loss`, of the size for all devices. Its arrays may be
        abstract and sharded too.
    - `also`: What is trained besides the adapters, see `lorax.trainable`.
    - `optimizer`: Defaults to `optax.adam`. Its state for a parameter has the sharding
        of the parameter.

    **Returns:**

    A `lorax.Plan`.

    **Raises:**

    `ValueError` if `loss` returns anything but one real floating point scalar, or if
    `lorax.trainable` raises it.
    """
    check_whole(model, "lorax.plan(loss, {}, batch)")
    params, frozen = partition(model, also)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    divided = _find_batch_axes(batch)
    trace = _Trace(loss, params, frozen, divided)
    everywhere = trace(drop_shardings(batch))
    local = trace(drop_shardings(batch, local_shape)) if divided else everywhere
    read, gathered = count_weight_reads(local)
    held = find_held(local)
    return Plan(
        devices=count_devices((model, batch)),
        base=count_device_bytes(remove_keys(frozen)),
        adapters=count_device_bytes(params),
        gradients=count_device_bytes(params),
        optimizer=count_device_bytes(plan_optimizer_state(optimizer, params)),
        activations=sum(x.nbytes for x in held),
        flops=count_flops(everywhere),
        read=read,
        received=gathered
        + sum(_count_summed_bytes(x, divided) for x in list_arrays(params)),
        held=held,
    )


class _Trace:
    """The programs of a step for batches of several sizes."""

    def __init__(
        self,
        loss: Callable[[Any, Any], Any],
        params: PyTree,
        frozen: PyTree,
        divided: dict[str, int],
    ):
        self.loss = loss
        self.weights = [
            Value(0, _describe_weight(x, divided))
            for x in list_arrays((params, frozen))
        ]
        self.model = drop_shardings((params, frozen))

    def __call__(self, batch: PyTree) -> Program:
        arrays, rest = eqx.partition((*self.model, batch), is_array)
        leaves, treedef = jax.tree.flatten(arrays)

        def step(leaves: Sequence[Any]) -> Any:
            arrays = jax.tree.unflatten(treedef, leaves)
            params, frozen, batch = eqx.combine(arrays, rest)

            def of_params(params: Any) -> Any:
                return _check_scalar(self.loss(eqx.combine(params, frozen), batch))

            return eqx.filter_value_and_grad(of_params)(params)

        jaxpr = jax.make_jaxpr(step)(leaves)
        of_batch = [Value(0) for _ in leaves[len(self.weights) :]]
        return build_program(jaxpr, [*self.weights, *of_batch])


def _describe_weight(x: Any, divided: dict[str, int]) -> StoredWeight:
    parts = math.prod(x.shape) // max(math.prod(local_shape(x)), 1)
    # It is gathered along the axes that divide the batch: each device has its own
    # examples, and needs the whole weight for them.
    over = math.prod(size for name, size in mesh_axes(x).items() if name in divided)
    return StoredWeight(x.dtype.itemsize, max(parts, 1), max(parts // over, 1))


def _find_batch_axes(batch: PyTree) -> dict[str, int]:
    return {k: v for x in list_arrays(batch) for k, v in mesh_axes(x).items()}


def _count_summed_bytes(param: Any, divided: dict[str, int]) -> int:
    """The bytes that a device receives as the gradient of `param` is summed over a
    divided batch: its part of the sum, and the rest if the sum is replicated."""
    count = math.prod(divided.values())
    weight = _describe_weight(param, divided)
    size = math.prod(param.shape) * weight.itemsize
    whole, held = size // weight.gathered_parts, size // weight.parts
    return whole - whole // count + held - whole // count


def _check_scalar(value: Any) -> Any:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape == () and _is_real(dtype):
        return value
    got = f"shape {shape} and dtype {dtype}" if is_array(value) else type(value)
    raise ValueError(
        f"`loss` returned {got}, not one floating point scalar. Take the mean of it, "
        "or leave out what comes with it: `lambda model, batch: loss(model, batch)[0]`."
    )


def _is_real(dtype: Any) -> bool:
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.floating)
