from .initialisers import (
    check_key as check_key,
    Init as Init,
    initial_factor as initial_factor,
    is_one_key as is_one_key,
    key_for as key_for,
    key_for_words as key_for_words,
    words_of as words_of,
)
from .lora import (
    factor_shapes as factor_shapes,
    factor_shardings as factor_shardings,
    LoraWeight as LoraWeight,
)
from .operators import matmul as matmul
from .parts import (
    check_frozen as check_frozen,
    check_whole as check_whole,
    lacks_arrays as lacks_arrays,
    misfits as misfits,
)
from .weight import (
    AbstractLoraWeight as AbstractLoraWeight,
    base_of as base_of,
    is_weight as is_weight,
    upon as upon,
    without_base as without_base,
)
