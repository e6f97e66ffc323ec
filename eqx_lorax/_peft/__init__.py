"""PEFT's format: a folder with a configuration and tensors, read into an adapter and
written from one.

Three rooms inside stand on each other: `pytorch` (paths and shapes there), `config`
(the configuration) and `tensors` (the factors); the files beside them put these
together. What formats share, such as reading safetensors or comparing bases, is in
`_adapters`, and the public functions are in `peft.py`.
"""

from .folder import (
    has_prefix as has_prefix,
    plain_names as plain_names,
    PREFIX as PREFIX,
    read_folder as read_folder,
)
from .pytorch import Names as Names
from .reading import adapter_from as adapter_from
from .tensors import stored_in_out as stored_in_out
from .tied import check_ties as check_ties, tied_tables as tied_tables
from .writing import whole_modules as whole_modules, written as written
