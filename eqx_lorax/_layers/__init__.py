from .forwarding import NORMS as NORMS, replace_fields as replace_fields
from .layer import (
    AbstractLoraLayer as AbstractLoraLayer,
    has_active_dropout as has_active_dropout,
    is_layer as is_layer,
)
from .layers import (
    find_layer as find_layer,
    is_adapted_by_default as is_adapted_by_default,
    is_field_of_kind as is_field_of_kind,
    is_known_layer as is_known_layer,
    kernel_axes as kernel_axes,
    LoraConv as LoraConv,
    LoraEmbedding as LoraEmbedding,
    LoraLinear as LoraLinear,
    LoraModule as LoraModule,
)
