"""Quantised bases: arrays of few bits an entry, that stand for arrays of floats.

Here is what they are made of, how arrays become quantised, how they answer to the
protocol of bases in `_factored`, and the formats of other libraries. Which arrays of a
model are quantised is not decided here: that is a matter of `_modules`.
"""

# Registers what can be done with it.
from . import operations as operations
from .array import is_quantised as is_quantised, QuantisedArray as QuantisedArray
from .encoding import (
    Axes as Axes,
    find_format as find_format,
    find_shardings as find_shardings,
    quantise_array as quantise_array,
    quantise_like as quantise_like,
)
from .formats import Format as Format, FORMATS as FORMATS
from .reading import (
    find_companions as find_companions,
    from_bitsandbytes as from_bitsandbytes,
    from_gguf as from_gguf,
    open_bitsandbytes as open_bitsandbytes,
    StoredWeight as StoredWeight,
)
