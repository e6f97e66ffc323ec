"""What was gathered of a model, and what follows from it."""

from typing import get_args, Literal

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from .._methods import AbstractStart
from .ranks import share_out
from .records import GradientRecord, InputRecord
from .starts import Corda, Direction, Eva, LoraGa


class Calibration(eqx.Module):
    """What `lorax.calibrate` gathered. Its methods make starts, for `init=` of
    `lorax.loraify` and `lorax.init_lora`, and ranks, for `rank=`.

    It is a pytree of arrays, which `pickle` can save.
    """

    inputs: dict[str, InputRecord]
    """Sums over the inputs, by the path of the weight."""

    gradients: dict[str, GradientRecord]
    """Products with the gradient, by the path of the weight."""

    def covariance(self, name: str) -> Array:
        """The uncentred covariance `Σ x xᵀ / count` of the inputs of a weight, of shape
        `(*batch, inputs, inputs)`. Where it was sketched this is an approximation.

        **Arguments:**

        - `name`: The path of the weight, such as `"layers.0.weight"`.

        **Raises:**

        `ValueError` if there is none.
        """
        return _find(self.inputs, name, "inputs").covariance()

    def gradient(self, name: str) -> tuple[Array, Array, Array]:
        """The leading singular values and vectors `u, s, v` of the gradient in a
        weight, the mean over the batches: `u` of shape `(*batch, outputs, k)`, `s` of
        shape `(*batch, k)` and `v` of shape `(*batch, k, inputs)`. Their product
        `u s v` is the gradient itself if that has no more than `k` directions.

        **Arguments:**

        - `name`: The path of the weight.

        **Raises:**

        `ValueError` if there is none.
        """
        return _find(self.gradients, name, "gradients").decompose()

    def eva(self, *, centred: bool = False) -> AbstractStart:
        """The start of EVA. The factor on the side of the inputs has the directions
        along which they vary most, `a = V[:rank]`, and the other is zero.

        **Arguments:**

        - `centred`: Whether the mean of the inputs is taken off first, as PEFT's
            incremental principal component analysis does.

        ??? cite

            [Parameter Efficient Fine-tuning via Explained Variance
            Adaptation](https://arxiv.org/abs/2410.07170), algorithm 1.
        """
        _check_any(self.inputs, "inputs", "EVA")
        return Eva(self.inputs, centred)

    def corda(self, mode: Literal["ipm", "kpm"] = "ipm") -> AbstractStart:
        """The start of CorDA, by the singular value decomposition
        `W C = U S Vᵀ` of the weight and the covariance of its inputs:
        `b = U sqrt(S / scale)` and `a = sqrt(S / scale) Vᵀ C⁻¹`.

        The covariance is divided by the mean of its diagonal, of which a hundredth is
        added to it. So for white inputs the start is that of PiSSA.

        **Arguments:**

        - `mode`: `"ipm"`, previewed by instructions: the largest singular values, for
            data of the new task. `"kpm"`, preserving knowledge: the smallest ones, for
            data of what should not be forgotten. These are PEFT's names.

        **Raises:**

        `ValueError` if the mode is unknown.

        ??? cite

            [CorDA: Context-Oriented Decomposition Adaptation of Large Language
            Models](https://arxiv.org/abs/2406.05223), section 3.
        """
        if mode not in ("ipm", "kpm"):
            raise ValueError(f"`mode={mode!r}` must be 'ipm' or 'kpm'.")
        _check_any(self.inputs, "inputs", "CorDA")
        return Corda(self.inputs, mode)

    def lora_ga(
        self, *, gamma: float = 16.0, direction: Direction = "ArB2r"
    ) -> AbstractStart:
        """The start of LoRA-GA, whose first step is near to that of full fine-tuning.
        From the singular value decomposition `U S Vᵀ` of the gradient,
        `a = c V[:rank]ᵀ` and `b = c U[rank : 2 rank]`, where
        `c = outputs ** 0.25 / sqrt(gamma)`.

        **Arguments:**

        - `gamma`: The larger, the smaller the factors.
        - `direction`: Which singular vectors: `"ArB2r"` is as above, in `"A2rBr"` the
            two are exchanged, and in `"ArBr"` they alternate, `b` first.

        **Raises:**

        `ValueError` if `direction` is unknown or `gamma` is not positive.

        ??? cite

            [LoRA-GA: Low-Rank Adaptation with Gradient
            Approximation](https://arxiv.org/abs/2407.05000), algorithm 1.
        """
        if direction not in get_args(Direction):
            listed = ", ".join(map(repr, get_args(Direction)))
            raise ValueError(f"`direction={direction!r}` must be one of {listed}.")
        if not gamma > 0:
            raise ValueError(f"`gamma={gamma!r}` must be a positive number.")
        _check_any(self.gradients, "gradients", "LoRA-GA")
        return LoraGa(self.gradients, float(gamma), direction)

    def allocate_ranks(
        self,
        budget: int,
        *,
        max_rank: int | None = None,
        min_rank: int = 1,
        centred: bool = False,
    ) -> dict[str, int]:
        """Ranks for a budget, by how much of the variance of its inputs each direction
        of each weight explains. A direction that explains more, of whichever weight,
        comes first.

        !!! example

            ```python
            ranks = calibration.allocate_ranks(budget=16)
            model = lorax.loraify(
                model, list(ranks), rank=ranks, init=calibration.eva(), key=key
            )
            ```

        **Arguments:**

        - `budget`: The sum of all ranks. A stack counts once for each of its layers,
            which have the same rank.
        - `max_rank`: The largest rank of any weight. By default twice the mean, which
            is PEFT's `rho=2`.
        - `min_rank`: The smallest rank. With 0, weights may get none, as in PEFT; they
            are then not in the result.
        - `centred`: Whether the mean of the inputs is taken off first, as in PEFT.

        **Returns:**

        The rank for each weight, by its path: what `rank=` of `lorax.loraify` takes.
        The keys are a filter for just these weights.

        **Raises:**

        `ValueError` if there are no inputs, or the budget does not suffice for the
        smallest ranks.
        """
        _check_any(self.inputs, "inputs", "This")
        values: dict[str, np.ndarray] = {}
        for name, record in self.inputs.items():
            found, _, energy = jax.device_get(record.spectrum(centred))
            # Inputs that are all zero explain nothing.
            values[name] = found / np.where(energy > 0, energy, np.inf)[..., None]
        return share_out(values, budget, max_rank, min_rank)


def _find(records: dict, name: str, kind: str):
    if name not in records:
        raise ValueError(
            f"There are no {kind} of {name!r} in this calibration. There are "
            f"{', '.join(map(repr, records)) or 'none at all'}."
        )
    return records[name]


def _check_any(records: dict, kind: str, what: str) -> None:
    if not records:
        raise ValueError(
            f"{what} needs {kind}, and this calibration has none. Gather them, "
            f"`lorax.calibrate(..., gather={kind!r})`."
        )
