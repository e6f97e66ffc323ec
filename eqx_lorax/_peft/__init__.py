"""The checkpoint format of PEFT: paths (`names`), tensors (`layout`), the configuration
(`config`), and going there (`writing`) and back (`reading`)."""

from .folder import (
    has_prefix as has_prefix,
    plain_names as plain_names,
    PREFIX as PREFIX,
    read_folder as read_folder,
)
from .names import Names as Names
from .reading import adapter_from as adapter_from
from .sides import stored_in_out as stored_in_out
from .tied import check_ties as check_ties, tied_tables as tied_tables
from .writing import whole_modules as whole_modules, written as written
