"""A model as PyTorch names it: from paths here to paths there, and the shapes of arrays
there.

Nothing here knows PEFT: any format of PyTorch's world could use it. How PEFT names and
stores the factors of adapters is in `tensors`.
"""

from .modules import (
    arrays_of as arrays_of,
    is_module as is_module,
    modules_with_arrays as modules_with_arrays,
    named as named,
    template_for as template_for,
    torch_shape as torch_shape,
)
from .names import (
    expanded as expanded,
    few as few,
    Index as Index,
    Names as Names,
    template as template,
)
