"""The layer for modules of any other kind."""

import operator
from typing import Any

import equinox as eqx
import jax

from .forwarding import run_module
from .layer import AbstractLoraLayer


class LoraModule(AbstractLoraLayer):
    """Any other module with factored weights in the place of some of its arrays.

    It runs the module's own code through `lorax.lora`: calls, other methods, properties
    and operators such as `len`, `[]` and `@`. Whatever that does with the arrays, they
    stay factored where they can, and are materialised with a
    `lorax.MaterialiseWarning` where not. The reparameterisations
    `equinox.nn.WeightNorm` and `equinox.nn.SpectralNorm` take the norm of their weight
    and so always form it.
    """

    wrapped: eqx.Module

    adapts = ()
    by_default = False
    has_dropout = False
    is_lookup = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself: same arguments, same result."""
        with jax.named_scope("lorax.LoraModule"):
            return run_module(self, operator.call, *args, **kwargs)
