"""Adapters apart from their models: taken out of a model and put into one, this
library's own file format, checkpoints of a run, and what every other file format needs.

Other formats have rooms of their own, as PEFT's has in `_peft`. What is trained of a
model is decided in `_training`, and arithmetic on adapters is in `_arithmetic`.
"""

from .adapter import (
    Adapter as Adapter,
    DetachedWeight as DetachedWeight,
    extract_adapter as extract_adapter,
    insert_adapter as insert_adapter,
)
from .atomic import replace_file as replace_file
from .checkpoint import Checkpoints as Checkpoints
from .files import (
    AdapterFileError as AdapterFileError,
    check_base as check_base,
    map_tensors as map_tensors,
    name_dtype as name_dtype,
    parse_content as parse_content,
    read_tensors as read_tensors,
)
from .fingerprint import fingerprint_base as fingerprint_base
from .foreign import (
    explain_foreign_file as explain_foreign_file,
    explain_foreign_folder as explain_foreign_folder,
    explain_foreign_tensors as explain_foreign_tensors,
    is_native as is_native,
    PEFT_CONFIG as PEFT_CONFIG,
    PEFT_WEIGHTS as PEFT_WEIGHTS,
)
from .save import (
    adapter_info as adapter_info,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
