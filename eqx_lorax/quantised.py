"""Quantised weights in the formats of other libraries."""

from ._bases import from_bitsandbytes as from_bitsandbytes, from_gguf as from_gguf
