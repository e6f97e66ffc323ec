from .forwarding import NORMS as NORMS, replaced as replaced
from .layer import (
    AbstractLoraLayer as AbstractLoraLayer,
    drops as drops,
    is_layer as is_layer,
)
from .layers import (
    is_default as is_default,
    is_known as is_known,
    is_part_of_kind as is_part_of_kind,
    kernel_axes as kernel_axes,
    layer_for as layer_for,
    LoraConv as LoraConv,
    LoraEmbedding as LoraEmbedding,
    LoraLinear as LoraLinear,
    LoraModule as LoraModule,
)
