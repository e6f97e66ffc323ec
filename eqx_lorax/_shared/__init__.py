"""What every room needs: kinds of arrays and their dtypes, shardings and devices,
several processes, differences between versions of JAX, and parts of messages. Nothing
here knows of adapters, weights or models. What only one room needs lives in that room.
"""

from . import compat as compat, sharding as sharding
from .arrays import (
    accumulation_dtype as accumulation_dtype,
    AnyArray as AnyArray,
    as_array as as_array,
    axes_from_end as axes_from_end,
    check_real as check_real,
    count_bits as count_bits,
    is_abstract as is_abstract,
    is_array as is_array,
    is_inexact as is_inexact,
    is_traced as is_traced,
    multiply as multiply,
    promote as promote,
    PyTree as PyTree,
    zeros as zeros,
)
from .compat import (
    close as close,
    is_for_one_device as is_for_one_device,
    Jaxpr as Jaxpr,
    manual_axes as manual_axes,
    scan_counts as scan_counts,
)
from .devices import (
    count_bytes as count_bytes,
    count_device_bytes as count_device_bytes,
    count_devices as count_devices,
    drop_shardings as drop_shardings,
    list_arrays as list_arrays,
    local_shape as local_shape,
    mesh_axes as mesh_axes,
    plan_optimizer_state as plan_optimizer_state,
)
from .keywords import suggest_keywords as suggest_keywords
from .messages import list_some as list_some
from .modules import (
    AbstractQuickModule as AbstractQuickModule,
    make_unchecked as make_unchecked,
    replace_unchecked as replace_unchecked,
)
from .printing import (
    layer_document as layer_document,
    weight_document as weight_document,
)
from .processes import (
    replicate as replicate,
    spans_processes as spans_processes,
    write_once as write_once,
)
from .progress import follow as follow
from .sharding import (
    committed_sharding as committed_sharding,
    create as create,
    explicit_sharding as explicit_sharding,
    has_typed_mesh as has_typed_mesh,
    inherit_sharding as inherit_sharding,
    known_sharding as known_sharding,
    move_array as move_array,
    place_array as place_array,
    Placement as Placement,
    product_sharding as product_sharding,
    relabel as relabel,
    resolve_sharding as resolve_sharding,
    to_shape as to_shape,
    unshard as unshard,
)
from .tables import (
    format_table as format_table,
    name_group as name_group,
    star_numbers as star_numbers,
)
