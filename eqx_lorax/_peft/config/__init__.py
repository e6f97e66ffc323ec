"""`adapter_config.json`: its options, which modules its entries match by PEFT's rules,
and whether the tensors are all that it promises.

Tensors are known here by their names alone; their contents are in `tensors`.
"""

from .matching import is_named_alone as is_named_alone, list_ancestors as list_ancestors
from .missing import (
    Contents as Contents,
    find_missing as find_missing,
    is_parameter_targeted as is_parameter_targeted,
    warn_of_unused_patterns as warn_of_unused_patterns,
)
from .options import (
    check_config as check_config,
    find_alpha as find_alpha,
    find_rank as find_rank,
    make_config as make_config,
)
