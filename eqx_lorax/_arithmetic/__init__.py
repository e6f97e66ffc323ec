"""Adapters as operands: put together with a model, scaled, stacked, added up, mixed.

Everything here takes adapters of one model, usually the `params` of `lorax.partition`,
and goes through them place by place. What a single weight does under these operations
is in `_methods`; files and formats are in `_adapters`.
"""

from .attach import attach as attach
from .bank import AdapterBank as AdapterBank
from .combine import combine as combine
from .compress import as_matrices as as_matrices, decompose as decompose
from .convert import as_lora as as_lora
from .many import scale as scale, stack as stack
from .sum import weighted_sum as weighted_sum
from .updates import (
    dense_base as dense_base,
    dense_update as dense_update,
    fold as fold,
    split_layers as split_layers,
)
