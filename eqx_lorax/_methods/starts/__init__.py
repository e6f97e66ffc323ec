"""Starts of both factors, in the place of a random `a` and a `b` of zeros. Those that
need data are in `_calibration`."""

from .decompositions import (
    approximate_svd as approximate_svd,
    Milora as Milora,
    Olora as Olora,
    Orthogonal as Orthogonal,
    Pissa as Pissa,
    share_out as share_out,
)
from .start import AbstractStart as AbstractStart


STARTS: dict[str, AbstractStart] = {
    "orthogonal": Orthogonal(),
    "pissa": Pissa(),
    "olora": Olora(),
    "milora": Milora(),
}
