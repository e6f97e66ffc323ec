"""Adapters in models: which arrays are adapted, with which rank and axes, and putting
the layers in, taking them out and merging them. The layers themselves live in
`_layers`, and the arithmetic of weights in `_methods`. What is trained, saved or
planned is decided in the rooms above.
"""

from .dropout import dropout_key as dropout_key, remove_keys as remove_keys
from .form import infer_axes as infer_axes, resolve_forms as resolve_forms
from .forward import merged_forward as merged_forward
from .held import (
    has_gate as has_gate,
    without_gates as without_gates,
    without_views as without_views,
)
from .loftq import LoftQ as LoftQ
from .options import PerTarget as PerTarget
from .quantising import dequantise as dequantise, quantise as quantise
from .surgery import (
    loraify as loraify,
    make_wrapper as make_wrapper,
    unloraify as unloraify,
)
from .targets import (
    find_target as find_target,
    find_targets as find_targets,
    join_targets as join_targets,
    Target as Target,
)
