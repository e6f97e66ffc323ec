"""PEFT's format: a folder with a configuration and tensors, read into an adapter and
written from one.

Four rooms inside stand on each other: `pytorch` (paths and shapes there), `config`
(the configuration), `tensors` (the factors) and `methods` (those beside LoRA and DoRA,
one file each); the files beside them put these together. What formats share, such as
reading safetensors or comparing bases, is in `_adapters`, and the public functions are
in `peft.py`. Weights of whole models are in `weights`, which needs `pytorch` and
`tensors` alone.
"""

from .folder import (
    has_prefix as has_prefix,
    PREFIX as PREFIX,
    read_folder as read_folder,
    strip_names as strip_names,
    to_key as to_key,
)
from .forms import as_written as as_written
from .pytorch import Names as Names
from .reading import import_adapter as import_adapter
from .tensors import find_in_out as find_in_out
from .tied import check_ties as check_ties, find_tied_tables as find_tied_tables
from .weights import load_weights as load_weights, save_weights as save_weights
from .writing import (
    collect_whole as collect_whole,
    export_adapter as export_adapter,
)
