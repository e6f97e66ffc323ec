from . import compat as compat, sharding as sharding
from .arrays import (
    as_array as as_array,
    bits_of as bits_of,
    check_real as check_real,
    is_array as is_array,
    is_inexact as is_inexact,
    multiply as multiply,
    promote as promote,
    wide as wide,
    zeros as zeros,
)
from .compat import (
    closed as closed,
    Jaxpr as Jaxpr,
    manual_axes as manual_axes,
    scan_counts as scan_counts,
)
from .devices import (
    arrays_of as arrays_of,
    device_count as device_count,
    device_nbytes as device_nbytes,
    local_shape as local_shape,
    mesh_axes as mesh_axes,
    nbytes as nbytes,
    optimizer_state as optimizer_state,
    plain as plain,
)
from .keywords import suggests as suggests
from .printing import (
    layer_document as layer_document,
    weight_document as weight_document,
)
from .processes import on_hand as on_hand, write_once as write_once
from .sharding import (
    chosen as chosen,
    created as created,
    explicit_sharding as explicit_sharding,
    follow as follow,
    of_product as of_product,
    placed as placed,
    Placement as Placement,
    relabelled as relabelled,
    sharding_of as sharding_of,
    where_put as where_put,
)
