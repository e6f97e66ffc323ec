"""The normal form of an adapted weight, and all that is done to it without forming it.

Here are products over labelled axes, `Factored`, its products with activations, images
and indices, its views, and the protocol that a base answers to. What is trained of a
weight, and how its factors are made, is not known here: that is a matter of `_methods`.
"""

from . import operators as operators, views as views
from .base import (
    add as add,
    as_form as as_form,
    dense as dense,
    find_explicit_sharding as find_explicit_sharding,
    map_arrays as map_arrays,
    materialise as materialise,
    register_base as register_base,
    stands_for_array as stands_for_array,
)
from .concatenate import concatenate as concatenate
from .contraction import (
    contract as contract,
    contract_base as contract_base,
    label_hidden as label_hidden,
    order_factors as order_factors,
)
from .convolution import (
    channels_first as channels_first,
    convolve as convolve,
    convolve_base as convolve_base,
)
from .form import (
    Base as Base,
    factor_axes as factor_axes,
    factor_shapes as factor_shapes,
    Factored as Factored,
    is_factored as is_factored,
    not_of_one_weight as not_of_one_weight,
)
from .gather import gather as gather, take as take
from .names import checkpoint_policy as checkpoint_policy, name_product as name_product
from .primitives import trace_sum as trace_sum, trace_unpack as trace_unpack
from .products import (
    Label as Label,
    Labels as Labels,
    multiply_arrays as multiply_arrays,
    NotFactored as NotFactored,
    Precision as Precision,
    precision_for_any_dtype as precision_for_any_dtype,
    RANK as RANK,
    scale_along as scale_along,
)
