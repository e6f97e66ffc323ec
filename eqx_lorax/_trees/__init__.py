"""Models as trees: the places in them, the filters that name places, the trees of ranks
that `lorax.init_lora` takes, and the replacement of nodes. A factored weight counts as
a leaf here, and an adapted layer as the module that it stands for. Whether an array can
be adapted, and how, is decided in `_modules`.
"""

from .filters import (
    exclude_places as exclude_places,
    explain_no_match as explain_no_match,
    Filter as Filter,
    FilterMatch as FilterMatch,
    list_available as list_available,
    list_briefly as list_briefly,
    match_filter as match_filter,
    matches as matches,
    matches_around as matches_around,
    Pattern as Pattern,
)
from .places import (
    flatten_one_level as flatten_one_level,
    join_path as join_path,
    Place as Place,
    Places as Places,
    rebuild as rebuild,
)
from .spec import (
    DecisionFn as DecisionFn,
    KeyPath as KeyPath,
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    LoraSpec as LoraSpec,
    map_spec as map_spec,
    simple_spec as simple_spec,
    SpecValue as SpecValue,
)
