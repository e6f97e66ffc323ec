"""The methods beside LoRA itself, one file each."""

from .adalora import AdaLoraWeight as AdaLoraWeight
from .dora import DoraWeight as DoraWeight
from .full import FullWeight as FullWeight
from .ia3 import Ia3Weight as Ia3Weight
from .loha import LohaWeight as LohaWeight
from .lokr import LokrWeight as LokrWeight, split_size as split_size
from .lora_fa import LoraFaWeight as LoraFaWeight
from .lora_xs import LoraXsWeight as LoraXsWeight
from .segments import SegmentsWeight as SegmentsWeight
from .tokens import TokensWeight as TokensWeight
from .vera import VeraWeight as VeraWeight
