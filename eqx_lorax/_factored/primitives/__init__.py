"""Primitives of our own, for what JAX or its compiler would not do well unaided."""

from .barrier import apart_on_cpu as apart_on_cpu
from .depthwise import (
    convolve_depthwise as convolve_depthwise,
    is_depthwise as is_depthwise,
)
from .padding import convolve_padded as convolve_padded
from .tangent import product_with_factor as product_with_factor
from .unpacking import (
    Product as Product,
    trace_sum as trace_sum,
    trace_unpack as trace_unpack,
    unpack as unpack,
)
from .vector import (
    is_small_product as is_small_product,
    multiply_vector as multiply_vector,
)
