"""The atom: weights that are a frozen base plus a trainable update, one file a method.

A method says how it starts, what of it is trained, how it is scaled without its base,
and its normal form; whatever can be said for all methods is in `AbstractLoraWeight`.
How weights get into models, and what files and optimizers do with them, is not here.
"""

from .family import (
    AdaLoraWeight as AdaLoraWeight,
    DoraWeight as DoraWeight,
    FullWeight as FullWeight,
    Ia3Weight as Ia3Weight,
    LohaWeight as LohaWeight,
    LokrWeight as LokrWeight,
    LoraFaWeight as LoraFaWeight,
    LoraXsWeight as LoraXsWeight,
    SegmentsWeight as SegmentsWeight,
    split_size as split_size,
    TokensWeight as TokensWeight,
    VeraWeight as VeraWeight,
)
from .fresh import Fresh as Fresh
from .fused_weight import FusedWeight as FusedWeight, unfuse as unfuse
from .initialisers import (
    check_key as check_key,
    Init as Init,
    is_one_key as is_one_key,
    key_for as key_for,
    key_for_words as key_for_words,
    resolve_init as resolve_init,
    words_of as words_of,
)
from .lora import LoraWeight as LoraWeight
from .missing import is_missing as is_missing, list_missing as list_missing
from .parts import (
    check_frozen as check_frozen,
    check_whole as check_whole,
    find_misfits as find_misfits,
    list_weights as list_weights,
)
from .registry import (
    assign_options as assign_options,
    find_method as find_method,
    list_methods as list_methods,
)
from .relative import (
    join_start as join_start,
    RelativeLoraWeight as RelativeLoraWeight,
)
from .sided import (
    AbstractScaledWeight as AbstractScaledWeight,
    AbstractSidedWeight as AbstractSidedWeight,
)
from .starts import (
    AbstractStart as AbstractStart,
    Milora as Milora,
    Olora as Olora,
    Orthogonal as Orthogonal,
    Pissa as Pissa,
    share_out as share_out,
)
from .weight import (
    AbstractLoraWeight as AbstractLoraWeight,
    base_of as base_of,
    FactoredWeight as FactoredWeight,
    is_packed as is_packed,
    is_weight as is_weight,
)
