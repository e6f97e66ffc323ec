"""LoRA for Equinox models and any other JAX code."""

import importlib.metadata

from . import constants as constants, peft as peft
from ._attach import attach as attach
from ._bank import AdapterBank as AdapterBank
from ._checkpoint import Checkpoints as Checkpoints
from ._combine import combine as combine
from ._dropout import dropout_key as dropout_key
from ._forward import merged_forward as merged_forward
from ._function import lora as lora
from ._layer import AbstractLoraLayer as AbstractLoraLayer
from ._layers import (
    LoraConv as LoraConv,
    LoraEmbedding as LoraEmbedding,
    LoraLinear as LoraLinear,
    LoraModule as LoraModule,
)
from ._lora import LoraWeight as LoraWeight
from ._many import scale as scale, stack as stack
from ._optimizer import (
    value_and_grad_from_state as value_and_grad_from_state,
    wrap_optimizer as wrap_optimizer,
)
from ._params import (
    init_lora as init_lora,
    merge_params as merge_params,
    split_lora_params as split_lora_params,
)
from ._plan import (
    Accelerator as Accelerator,
    Plan as Plan,
    plan as plan,
    StepBound as StepBound,
)
from ._report import MaterialiseWarning as MaterialiseWarning
from ._save import (
    adapter_info as adapter_info,
    AdapterFileError as AdapterFileError,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from ._spec import (
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    LoraSpec as LoraSpec,
    simple_spec as simple_spec,
)
from ._sum import weighted_sum as weighted_sum
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
