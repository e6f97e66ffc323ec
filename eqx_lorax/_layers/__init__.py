"""The layers that stand in the place of adapted ones, one file for each kind, and the
registry of kinds. Each layer keeps the module that it stands for and answers as that
module does. Choosing which modules of a model are adapted, and putting layers into the
model, is done in `_modules`.
"""

from .conv import LoraConv as LoraConv
from .embedding import LoraEmbedding as LoraEmbedding
from .forwarding import NORMS as NORMS, replace_fields as replace_fields
from .kinds import (
    find_axes as find_axes,
    find_layer as find_layer,
    is_adapted_by_default as is_adapted_by_default,
    is_field_of_kind as is_field_of_kind,
    is_known_layer as is_known_layer,
    list_adapted_names as list_adapted_names,
    register as register,
)
from .layer import (
    AbstractLoraLayer as AbstractLoraLayer,
    has_active_dropout as has_active_dropout,
    is_layer as is_layer,
)
from .linear import LoraLinear as LoraLinear
from .module import LoraModule as LoraModule
