from .function import (
    AbstractOpaque as AbstractOpaque,
    call as call,
    Door as Door,
    lora as lora,
)
from .report import (
    MaterialiseWarning as MaterialiseWarning,
    OnMaterialise as OnMaterialise,
)
