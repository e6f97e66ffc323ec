from .dropout import dropout_key as dropout_key, without_keys as without_keys
from .form import axes_of as axes_of
from .forward import merged_forward as merged_forward
from .held import without_gates as without_gates, without_views as without_views
from .surgery import loraify as loraify, unloraify as unloraify, wrapping as wrapping
from .targets import (
    merged_targets as merged_targets,
    Target as Target,
    target_of as target_of,
)
