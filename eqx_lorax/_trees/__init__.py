from .filters import (
    available as available,
    Filter as Filter,
    in_short as in_short,
    matches as matches,
    matches_around as matches_around,
    Named as Named,
    named_places as named_places,
    no_match as no_match,
    Pattern as Pattern,
    without as without,
)
from .places import (
    children as children,
    joined as joined,
    Place as Place,
    Places as Places,
    rebuild as rebuild,
)
from .spec import (
    LORA_FREEZE as LORA_FREEZE,
    LORA_FULL as LORA_FULL,
    LoraSpec as LoraSpec,
    map_spec as map_spec,
    simple_spec as simple_spec,
    SpecValue as SpecValue,
)
