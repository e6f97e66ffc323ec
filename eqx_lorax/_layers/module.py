"""The layer for modules of any other kind."""

import operator
from typing import Any

import equinox as eqx
import jax

from .forwarding import run_module
from .layer import AbstractLoraLayer


class LoraModule(AbstractLoraLayer):
    """Any other module. Factored weights replace some of its arrays.

    It runs the module's own code through `lorax.lora`: calls, other methods, properties
    and operators such as `len`, `[]` and `@`. Weights stay factored where that code
    allows it. Elsewhere they are materialised, with a `lorax.MaterialiseWarning`.
    `equinox.nn.WeightNorm` and `equinox.nn.SpectralNorm` take the norm of their weight,
    so they always form it.
    """

    wrapped: eqx.Module

    adapts = ()
    by_default = False
    has_dropout = False
    is_lookup = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module: same arguments, same result."""
        with jax.named_scope("lorax.LoraModule"):
            return run_module(self, operator.call, *args, **kwargs)
