"""The factors as PEFT stores them: a layout for each kind of layer, in which order
their sides are, and where the array that they adapt is in a model here.

What is no factor (biases, whole modules, bases) is in the files of the room around this
one, and options and paths are in `config` and `pytorch`.
"""

from .counterparts import (
    Counterpart as Counterpart,
    find_counterparts as find_counterparts,
)
from .in_out import find_in_out as find_in_out, InOut as InOut
from .joining import (
    join_layers as join_layers,
    list_names as list_names,
    read_factors as read_factors,
)
from .layout import (
    choose_part_layout as choose_part_layout,
    Conv as Conv,
    Embedding as Embedding,
    Experts as Experts,
    Factors as Factors,
    Layout as Layout,
    Linear as Linear,
    MAGNITUDE as MAGNITUDE,
    warn_of_convolution as warn_of_convolution,
)
from .nesting import (
    check_order as check_order,
    choose_order as choose_order,
    group_by_module as group_by_module,
    infer_order as infer_order,
    make_prefix as make_prefix,
    make_prefixes as make_prefixes,
)
from .versions import is_possible as is_possible
