"""Adapters apart from their models: taken out of a model and put into one, this
library's own file format, checkpoints of a run, and what every other file format needs.

Other formats have rooms of their own, as PEFT's has in `_peft`. What is trained of a
model is decided in `_training`, and arithmetic on adapters is in `_arithmetic`.
"""

from .adapter import (
    Adapted as Adapted,
    Adapter as Adapter,
    adapter_of as adapter_of,
    put_into as put_into,
)
from .atomic import replacing as replacing
from .checkpoint import Checkpoints as Checkpoints
from .fingerprint import base_digests as base_digests
from .foreign import (
    foreign_file as foreign_file,
    foreign_folder as foreign_folder,
    foreign_tensors as foreign_tensors,
    is_native as is_native,
    PEFT_CONFIG as PEFT_CONFIG,
    PEFT_WEIGHTS as PEFT_WEIGHTS,
)
from .save import (
    adapter_info as adapter_info,
    AdapterFileError as AdapterFileError,
    check_base as check_base,
    load_adapter as load_adapter,
    MALFORMED as MALFORMED,
    read_tensors as read_tensors,
    save_adapter as save_adapter,
)
