"""Where jax-lorax has these two."""

from ._trees import LORA_FREEZE as LORA_FREEZE, LORA_FULL as LORA_FULL
