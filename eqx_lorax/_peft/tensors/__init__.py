"""The factors as PEFT stores them: a layout for each kind of layer, in which order
their sides are, and where the array that they adapt is in a model here.

What is no factor (biases, whole modules, bases) is in the files of the room around this
one, and options and paths are in `config` and `pytorch`.
"""

from .homes import Home as Home, homes as homes
from .layout import (
    Embedding as Embedding,
    Experts as Experts,
    Factors as Factors,
    Layout as Layout,
    layout_for as layout_for,
    Linear as Linear,
    warn_of_convolution as warn_of_convolution,
)
from .nesting import (
    by_module as by_module,
    check_order as check_order,
    found_order as found_order,
    order_to_write as order_to_write,
    prefix_at as prefix_at,
    prefixes as prefixes,
)
from .sides import InOut as InOut, stored_in_out as stored_in_out
from .versions import can_be as can_be, layout_in_file as layout_in_file
