"""`lorax.lora(fn)`: running any JAX function on weights in normal form.

Here are the interpreter of traced programs, the rules of primitives, and the report of
what was materialised. Everything here knows `Factored`; nothing but `lora` itself knows
the weights of models, and nothing knows modules.
"""

from . import rules as rules
from .function import (
    AbstractOpaque as AbstractOpaque,
    call_with_weights as call_with_weights,
    CallOptions as CallOptions,
    lora as lora,
)
from .report import (
    MaterialiseWarning as MaterialiseWarning,
    OnMaterialise as OnMaterialise,
)
