"""The formats of quantised arrays: what the bits of an entry mean."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
    """What a code, a whole number of a few bits, stands for. It is times the scale of
    its block, plus the offset of its block if there is one:

    `codebook[code]` if there is a codebook, and `code - zero` if there is none.
    """

    name: str

    bits: tuple[int, ...] = (4,)
    """The number of bits in each plane, the lowest bits first. A code of five bits has
    four of them in one array and one in another."""

    codebook: tuple[float, ...] | None = dataclasses.field(default=None, repr=False)
    """The value of each code, in float32."""

    zero: int = 0
    """The code that stands for zero."""

    block: int | None = None
    """The number of entries in a block, where the format says it; `None` if it is
    chosen for each array."""

    has_offset: bool = False
    """Whether each block has an offset, which is added."""

    @property
    def values(self) -> np.ndarray:
        """The value of each code, float32 of shape `(2**sum(bits),)`."""
        if self.codebook is not None:
            return np.asarray(self.codebook, np.float32)
        return np.arange(2 ** sum(self.bits), dtype=np.float32) - np.float32(self.zero)


# The quantiles of the normal distribution, of QLoRA's appendix E, as bitsandbytes has
# them. https://arxiv.org/abs/2305.14314
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)

# A sign, two bits of exponent and one of mantissa, over its largest value.
_FP4_HALF = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_FP4 = tuple(float(np.float32(x)) for x in _FP4_HALF)


@functools.lru_cache
def make_dynamic_codebook() -> tuple[float, ...]:
    """The 256 values between -1 and 1 with which bitsandbytes quantises the scales of
    blocks: seven decades, of 1, 2, 4, ... values each.

    [8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861),
    section 1.3.
    """
    values = [0.0, 1.0]
    for i in range(7):
        # `linspace` as PyTorch has it, to the last bit: from both ends, rounded once.
        count = 2**i
        low, high = np.float32(0.1), np.float32(1)
        step = np.float64((high - low) / np.float32(count))
        up = np.arange(count + 1)
        bounds = np.where(
            up < (count + 1) // 2, low + step * up, high - step * (count - up)
        ).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / 2
        decade = np.float32(10.0 ** (i - 6)) * means
        values += [*decade.tolist(), *(-decade).tolist()]
    return tuple(sorted(values))


FORMATS = {
    x.name: x
    for x in (
        Format("nf4", codebook=_NF4),
        Format("fp4", codebook=(*_FP4, *(-x for x in _FP4))),
        Format("int8", (8,), zero=128),
        Format("int8-block", (8,), zero=128),
        Format("int4", has_offset=True),
    )
}
"""The formats of `lorax.quantise`, by name."""

SCALES = Format("scales", (8,), codebook=make_dynamic_codebook(), has_offset=True)
"""The format of nested scales."""
