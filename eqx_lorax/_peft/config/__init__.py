"""`adapter_config.json`: its options, which modules its entries match by PEFT's rules,
and whether the tensors are all that it promises.

Tensors are known here by their names alone; their contents are in `tensors`.
"""

from .matching import (
    is_named_alone as is_named_alone,
    list_ancestors as list_ancestors,
    make_targets as make_targets,
)
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
    LORA as LORA,
    make_config as make_config,
    make_patterns as make_patterns,
    Options as Options,
)
