"""What a training step needs, on paper: memory, operations, and time at the least."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import PyTree

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
)
from .._training import in_bytes, partition
from .._trees import Filter
from .costs import flops, peak, Program, program, Value, Weight, weight_reads


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A kind of device, by the numbers in its datasheet."""

    name: str
    memory: int | float
    """Bytes."""
    flops: int | float
    """Floating point operations a second, of products in the dtype of the model."""
    bandwidth: int | float
    """Bytes a second between the memory and the processor."""
    link: int | float = math.inf
    """Bytes a second that it can receive from other devices."""


@dataclasses.dataclass(frozen=True)
class StepBound:
    """What a training step takes at least on an accelerator, in seconds, if it does but
    one of three things."""

    accelerator: Accelerator
    compute: float
    """Computing all products, on all devices at once, at full speed."""
    memory: float
    """Reading the weights for every product, and reading and writing adapters and
    optimizer state once."""
    communication: float
    """Receiving the parts of weights that are gathered, and summing gradients."""
    fits: bool
    """Whether the plan's memory is there."""

    @property
    def seconds(self) -> float:
        """The largest of the three: no step is faster."""
        return max(self.compute, self.memory, self.communication)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `lorax.plan` found. Its `str` is a table."""

    devices: int
    base: int
    """The bytes of all that is frozen, on one device, as are all that follow."""
    adapters: int
    """The bytes of what is trained."""
    gradients: int
    optimizer: int
    """The bytes of the optimizer's state."""
    activations: int
    """The most bytes that are live at once beside these: what the backward pass needs
    of the forward pass, what is computed with, and weights gathered for it."""
    flops: int
    """The operations of the products of one step, on all devices together."""
    read: int
    """The bytes of weights that the products of one step read on one device."""
    received: int
    """The bytes that one device receives in one step: parts of weights that are
    gathered, and of gradients that are summed over a divided batch."""

    @property
    def total(self) -> int:
        """The bytes of all on one device."""
        parts = (self.base, self.adapters, self.gradients, self.optimizer)
        return sum(parts) + self.activations

    def bound(self, accelerator: Accelerator) -> StepBound:
        """What one step takes at least on devices of one kind, and whether it fits.

        **Arguments:**

        - `accelerator`: What the devices are.

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

    def __str__(self) -> str:
        names = ("base", "adapters", "gradients", "optimizer", "activations", "total")
        sizes = {name: in_bytes(getattr(self, name)) for name in names}
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
    """What one training step of an adapted model needs on each device. Nothing is
    computed, nothing is allocated, and no device has to be there.

    !!! example

        ```python
        model = eqx.filter_eval_shape(make_model, key)  # shapes only
        model = lorax.loraify(model, rank=16, key=key)
        print(lorax.plan(loss, model, batch))
        ```

    The bytes of base, adapters, gradients and optimizer state are exact: an array with
    a sharding, even of a `jax.sharding.AbstractMesh`, counts as what of it is on one
    device. Activations are the peak of the traced step, as if each equation made an
    array; the page on planning says how near that is. A batch that is divided divides
    them; axes of the mesh that divide only weights are taken not to, so that with these
    it is too much.

    **Arguments:**

    - `loss`: A function `(model, batch) -> scalar`, as it is trained.
    - `model`: A model with adapters, or any model if `also` is given. Its arrays may
        be `jax.ShapeDtypeStruct`s with or without a sharding.
    - `batch`: What `loss` takes, of the size for all devices; its arrays may be
        abstract and sharded too.
    - `also`: What is trained besides the adapters, as of `lorax.trainable`.
    - `optimizer`: Defaults to `optax.adam`. Its state for a parameter is sharded as the
        parameter is.

    **Returns:**

    A `lorax.Plan`.

    **Raises:**

    As `lorax.trainable`, and `ValueError` if `loss` returns anything but one real
    floating point scalar.
    """
    check_whole(model, "lorax.plan(loss, {}, batch)")
    params, frozen = partition(model, also)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    divided = _batch_axes(batch)
    trace = _Trace(loss, params, frozen, divided)
    everywhere = trace(drop_shardings(batch))
    local = trace(drop_shardings(batch, local_shape)) if divided else everywhere
    read, gathered = weight_reads(local)
    return Plan(
        devices=count_devices((model, batch)),
        base=count_device_bytes(remove_keys(frozen)),
        adapters=count_device_bytes(params),
        gradients=count_device_bytes(params),
        optimizer=count_device_bytes(plan_optimizer_state(optimizer, params)),
        activations=peak(local),
        flops=flops(everywhere),
        read=read,
        received=gathered + sum(_summed(x, divided) for x in list_arrays(params)),
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
            Value(0, _weight(x, divided)) for x in list_arrays((params, frozen))
        ]
        self.model = drop_shardings((params, frozen))

    def __call__(self, batch: PyTree) -> Program:
        arrays, rest = eqx.partition((*self.model, batch), is_array)
        leaves, treedef = jax.tree.flatten(arrays)

        def step(leaves: Sequence[Any]) -> Any:
            arrays = jax.tree.unflatten(treedef, leaves)
            params, frozen, batch = eqx.combine(arrays, rest)

            def of_params(params: Any) -> Any:
                return _scalar(self.loss(eqx.combine(params, frozen), batch))

            return eqx.filter_value_and_grad(of_params)(params)

        jaxpr = jax.make_jaxpr(step)(leaves)
        of_batch = [Value(0) for _ in leaves[len(self.weights) :]]
        return program(jaxpr, [*self.weights, *of_batch])


def _weight(x: Any, divided: dict[str, int]) -> Weight:
    parts = math.prod(x.shape) // max(math.prod(local_shape(x)), 1)
    # It is gathered along the axes that divide the batch: each device has examples of
    # its own, and needs all of the weight for them.
    over = math.prod(size for name, size in mesh_axes(x).items() if name in divided)
    return Weight(x.dtype.itemsize, max(parts, 1), max(parts // over, 1))


def _batch_axes(batch: PyTree) -> dict[str, int]:
    return {k: v for x in list_arrays(batch) for k, v in mesh_axes(x).items()}


def _summed(param: Any, divided: dict[str, int]) -> int:
    """The bytes that a device receives so that the gradient of `param` is summed over a
    divided batch: its part of the sum, and, where the sum is replicated, the rest."""
    count = math.prod(divided.values())
    weight = _weight(param, divided)
    size = math.prod(param.shape) * weight.itemsize
    whole, held = size // weight.gathered_parts, size // weight.parts
    return whole - whole // count + held - whole // count


def _scalar(value: Any) -> Any:
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
