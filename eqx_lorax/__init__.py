"""LoRA for Equinox models and any other JAX code."""

from importlib.metadata import version as _version

from . import constants as constants, peft as peft, quantised as quantised
from ._adapters import (
    adapter_info as adapter_info,
    AdapterFileError as AdapterFileError,
    Checkpoints as Checkpoints,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from ._arithmetic import (
    AdapterBank as AdapterBank,
    as_lora as as_lora,
    attach as attach,
    combine as combine,
    scale as scale,
    stack as stack,
    weighted_sum as weighted_sum,
)
from ._bases import QuantisedArray as QuantisedArray
from ._calibration import (
    calibrate as calibrate,
    Calibration as Calibration,
    Gathered as Gathered,
)
from ._factored import (
    checkpoint_policy as checkpoint_policy,
    Factored as Factored,
    register_base as register_base,
)
from ._functions import (
    lora as lora,
    MaterialiseWarning as MaterialiseWarning,
    OnMaterialise as OnMaterialise,
)
from ._inspection import (
    allocate_ranks as allocate_ranks,
    Info as Info,
    info as info,
    quantisation_error as quantisation_error,
    QuantisationError as QuantisationError,
    Spectra as Spectra,
    spectra as spectra,
    TargetError as TargetError,
    TargetSpectrum as TargetSpectrum,
)
from ._layers import (
    AbstractLoraLayer as AbstractLoraLayer,
    LoraConv as LoraConv,
    LoraEmbedding as LoraEmbedding,
    LoraLinear as LoraLinear,
    LoraModule as LoraModule,
)
from ._methods import (
    AbstractLoraWeight as AbstractLoraWeight,
    AbstractSidedWeight as AbstractSidedWeight,
    AbstractStart as AbstractStart,
    AdaLoraWeight as AdaLoraWeight,
    DoraWeight as DoraWeight,
    Fresh as Fresh,
    FullWeight as FullWeight,
    Ia3Weight as Ia3Weight,
    Init as Init,
    LohaWeight as LohaWeight,
    LokrWeight as LokrWeight,
    LoraFaWeight as LoraFaWeight,
    LoraWeight as LoraWeight,
    LoraXsWeight as LoraXsWeight,
    Milora as Milora,
    Olora as Olora,
    Orthogonal as Orthogonal,
    Pissa as Pissa,
    RelativeLoraWeight as RelativeLoraWeight,
    SegmentsWeight as SegmentsWeight,
    TokensWeight as TokensWeight,
    VeraWeight as VeraWeight,
)
from ._modules import (
    dequantise as dequantise,
    dropout_key as dropout_key,
    LoftQ as LoftQ,
    loraify as loraify,
    merged_forward as merged_forward,
    PerTarget as PerTarget,
    quantise as quantise,
    unloraify as unloraify,
)
from ._optimizers import (
    adalora as adalora,
    lora_fa as lora_fa,
    lora_plus as lora_plus,
    lora_pro as lora_pro,
    orthogonality as orthogonality,
)
from ._planning import (
    Accelerator as Accelerator,
    HeldArrays as HeldArrays,
    Plan as Plan,
    plan as plan,
    StepBound as StepBound,
)
from ._shared import Placement as Placement
from ._training import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
    init_lora as init_lora,
    merge_params as merge_params,
    partition as partition,
    split_lora_params as split_lora_params,
    Summary as Summary,
    summary as summary,
    TargetSummary as TargetSummary,
    trainable as trainable,
    value_and_grad_from_state as value_and_grad_from_state,
    wrap_optimizer as wrap_optimizer,
)
from ._trees import (
    DecisionFn as DecisionFn,
    Filter as Filter,
    KeyPath as KeyPath,
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    LoraSpec as LoraSpec,
    Pattern as Pattern,
    simple_spec as simple_spec,
    SpecValue as SpecValue,
)


__version__ = _version("eqx-lorax")
