"""The methods beside LoRA, one file each: the tensors and options that PEFT has for
them, and the weight here.

LoRA and DoRA, with all that PEFT has for them alone, are in the rooms beside this one.
"""

from ..config import LORA, Options
from .adalora import AdaLora
from .format import Format as Format, Layer as Layer
from .ia3 import Ia3
from .joining import (
    Found as Found,
    read_layers as read_layers,
    split_layers as split_layers,
)
from .loha import Loha
from .lokr import Lokr
from .vera import Vera


_FORMATS: tuple[Format, ...] = (AdaLora(), Ia3(), Loha(), Lokr(), Vera())

BY_TYPE: dict[str, Format] = {x.peft_type: x for x in _FORMATS}
BY_METHOD: dict[str, Format] = {x.weight.method: x for x in _FORMATS}

OPTIONS: dict[str, Options] = {"LORA": LORA} | {
    x.peft_type: x.options for x in _FORMATS
}
"""The options of each `peft_type` that can be read."""

SHARED: tuple[str, ...] = tuple(name for x in _FORMATS for name in x.shared)
"""The names of tensors that belong to no module, but to a whole adapter."""
