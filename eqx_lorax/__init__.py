"""LoRA for Equinox models and any other JAX code."""

import importlib.metadata

from ._layers import (
    AbstractLoraLayer as AbstractLoraLayer,
    LoraConv as LoraConv,
    LoraEmbedding as LoraEmbedding,
    LoraLinear as LoraLinear,
    LoraModule as LoraModule,
    MaterialiseWarning as MaterialiseWarning,
)
from ._lora import LoraWeight as LoraWeight
from ._summary import (
    Summary as Summary,
    summary as summary,
    TargetSummary as TargetSummary,
)
from ._surgery import loraify as loraify, unloraify as unloraify
from ._train import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
    partition as partition,
    trainable as trainable,
)
from ._weight import AbstractLoraWeight as AbstractLoraWeight


__version__ = importlib.metadata.version("eqx-lorax")
