"""Quantised weights in the formats of other libraries, taken over bit for bit: packed
otherwise, and never as floats in between."""

from .bitsandbytes import from_bitsandbytes as from_bitsandbytes
from .gguf import from_gguf as from_gguf
