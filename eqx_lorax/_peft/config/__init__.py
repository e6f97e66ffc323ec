"""`adapter_config.json`: its options, which modules its entries match by PEFT's rules,
and whether the tensors are all that it promises.

Tensors are known here by their names alone; their contents are in `tensors`.
"""

from .matching import is_said_alone as is_said_alone, upwards as upwards
from .options import (
    alpha_of as alpha_of,
    check_config as check_config,
    new_config as new_config,
    rank_of as rank_of,
)
from .promises import (
    broken_promises as broken_promises,
    Contents as Contents,
    is_parameter_targeted as is_parameter_targeted,
    warn_of_idle_patterns as warn_of_idle_patterns,
)
