"""Quantised weights in the formats of other libraries, taken over bit for bit: packed
otherwise, and never as floats in between."""

from .bitsandbytes import (
    find_companions as find_companions,
    from_bitsandbytes as from_bitsandbytes,
    open_bitsandbytes as open_bitsandbytes,
    StoredWeight as StoredWeight,
)
from .gguf import from_gguf as from_gguf
