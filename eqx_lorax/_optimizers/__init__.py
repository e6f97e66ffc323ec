"""Optimizers that know what an adapter is: transformations of Optax around any base
optimizer. They find the adapters in the trees that they are given, the `params` of
either door. What is trained at all is decided in `_training`, and so is which frozen
parameters an optimizer never sees.
"""

from .adalora import adalora as adalora
from .lora_fa import lora_fa as lora_fa
from .lora_plus import lora_plus as lora_plus
from .lora_pro import lora_pro as lora_pro
from .orthogonality import orthogonality as orthogonality
