"""Where jax-lorax has these two."""

from ._spec import LORA_FREEZE as LORA_FREEZE, LORA_FULL as LORA_FULL
