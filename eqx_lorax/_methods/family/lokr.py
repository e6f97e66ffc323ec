"""LoKr: the Kronecker product of two small matrices."""

import math

import equinox as eqx
from jaxtyping import Array, ArrayLike

from ..._factored import Factored
from ..._shared import AnyArray
from ..fresh import Fresh
from ..sided import AbstractScaledWeight, split_whole
from ..weight import Weight


class LokrWeight(AbstractScaledWeight):
    """`w + scale * (w1 ⊗ w2)`: low-rank Kronecker product adaptation.

    The first axes of rows and of columns are split into a smaller and a larger size,
    `(l, k)` and `(m, n)`. `w1` is `(*batch, l, m)` and has the smaller ones, `w2` is
    `(*batch, k, n)`, with what other axes the sides have in `k` and `n`. Either may be
    a product of two factors of rank `factor_rank`: `w1_b · w1_a`, `w2_b · w2_a`. `w1`,
    or `w1_b`, starts at zero.

    The update has a rank of up to that of `w1` times that of `w2`, and products cost
    as much as of plain LoRA with that rank.

    **Options:**

    - `decompose_factor`: The smaller size of each pair, or the next below that divides
        the axis. By default, -1, the two sizes are as equal as can be.
    - `decompose_both`: Whether `w1` is a product of two factors too, where the rank is
        below half its size. `False` by default.

    !!! example

        ```python
        model = lorax.loraify(model, method="lokr", rank=4, decompose_factor=4, key=key)
        ```

    ??? cite

        [Navigating Text-to-Image Customization: From LyCORIS Fine-Tuning to Model
        Evaluation](https://arxiv.org/abs/2309.14859), section 3.2; [KronA](
        https://arxiv.org/abs/2212.10650).
    """

    w: Weight
    w1: AnyArray | None = None
    w1_b: AnyArray | None = None
    w1_a: AnyArray | None = None
    w2: AnyArray | None = None
    w2_b: AnyArray | None = None
    w2_a: AnyArray | None = None
    alpha: float = eqx.field(static=True, default=1.0)
    rows: tuple[int, ...] = eqx.field(static=True, default=(-2,))
    columns: tuple[int, ...] = eqx.field(static=True, default=(-1,))
    rank_stabilised: bool = eqx.field(static=True, default=False)
    factor_rank: int = eqx.field(static=True, default=1)
    decomposed: tuple[bool, ...] = eqx.field(static=True, default=(False, True))

    method = "lokr"
    frozen = ("w",)
    axes = {
        "w1": ("l", "m"),
        "w1_b": ("l", "rank"),
        "w1_a": ("rank", "m"),
        "w2": ("k", "n"),
        "w2_b": ("k", "rank"),
        "w2_a": ("rank", "n"),
    }

    @classmethod
    def create(
        cls, fresh: Fresh, *, decompose_factor: int = -1, decompose_both: bool = False
    ) -> "LokrWeight":
        rank, sizes = fresh.rank, dict(rank=fresh.rank)
        halves = []
        for words, axes in zip((("l", "k"), ("m", "n")), (fresh.rows, fresh.columns)):
            first, *others = (fresh.shape[axis] for axis in axes)
            small, large = split_size(first, decompose_factor)
            sizes |= dict(zip(words, (small, large * math.prod(others))))
            halves.append((small / 2, large / 2))
        of_w1, of_w2 = (max(pair) for pair in zip(*halves))
        decomposed = (decompose_both and rank < of_w1, rank < of_w2)
        arrays = {}
        for name in _used(decomposed):
            axes = fresh.axes(*((word, sizes[word]) for word in cls.axes[name]))
            if name in ("w1", "w1_b"):
                arrays[name] = fresh.zeros(axes)
            else:
                fan_in = sizes[cls.axes[name][-1]]
                arrays[name] = fresh.uniform(axes, fan_in, name)
        return LokrWeight(
            fresh.w, **arrays, **fresh.settings, factor_rank=rank, decomposed=decomposed
        )

    def used_axes(self) -> dict[str, tuple[str, ...]]:
        return {name: self.axes[name] for name in _used(self.decomposed)}

    @property
    def rank(self) -> int:
        """The rank of the small matrices that are products."""
        return self.factor_rank

    def factored(self) -> Factored:
        self.check_whole()
        first, second = self.decomposed
        b1, a1 = (self.w1_b, self.w1_a) if first else split_whole(self.w1)
        b2, a2 = (self.w2_b, self.w2_a) if second else split_whole(self.w2)
        return self.to_form(
            self.unflatten_rows(_kronecker(b1, b2)),
            self.unflatten_columns(_kronecker(a1, a2)),
            self.scale,
        )

    def scaled(self, factor: ArrayLike) -> "LokrWeight":
        return self.with_scaled("w1_b" if self.decomposed[0] else "w1", factor)


def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller one first, as PEFT splits it: as
    equal as can be, or with the first one `factor` or the next below."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    divisors = [i for i in range(1, math.isqrt(size) + 1) if size % i == 0]
    smaller = max(i for i in divisors if i <= most)
    return smaller, size // smaller


def _used(decomposed: tuple[bool, ...]) -> list[str]:
    names = []
    for name, is_product in zip(("w1", "w2"), decomposed):
        names += [f"{name}_b", f"{name}_a"] if is_product else [name]
    return names


def _kronecker(x: AnyArray | None, y: AnyArray | None) -> Array:
    assert x is not None and y is not None
    product = x[..., :, None, :, None] * y[..., None, :, None, :]
    rows, columns = x.shape[-2] * y.shape[-2], x.shape[-1] * y.shape[-1]
    return product.reshape(*product.shape[:-4], rows, columns)
