"""What of a model is trained: partitions, gradients and optimizers that leave out the
rest, the interface for trees of parameters, and the table of what training takes.

How a module gets its adapters is in `_modules`, and what a step costs before it has run
is in `_planning`. Saving what was trained is in `_adapters`.
"""

from .optimizer import (
    value_and_grad_from_state as value_and_grad_from_state,
    wrap_optimizer as wrap_optimizer,
)
from .params import (
    init_lora as init_lora,
    merge_params as merge_params,
    split_lora_params as split_lora_params,
)
from .summary import (
    format_bytes as format_bytes,
    Summary as Summary,
    summary as summary,
    TargetSummary as TargetSummary,
)
from .train import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
    find_trained_places as find_trained_places,
    partition as partition,
    trainable as trainable,
)
