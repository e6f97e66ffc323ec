"""A model as PyTorch names it: from paths here to paths there, and the shapes of arrays
there.

Nothing here knows PEFT: any format of PyTorch's world could use it. How PEFT names and
stores the factors of adapters is in `tensors`.
"""

from .modules import (
    find_modules as find_modules,
    find_own_arrays as find_own_arrays,
    is_module as is_module,
    path_in_names as path_in_names,
    require_template as require_template,
    to_torch_shape as to_torch_shape,
)
from .names import (
    expand as expand,
    find_template as find_template,
    Index as Index,
    list_paths as list_paths,
    Names as Names,
)
