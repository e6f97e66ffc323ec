"""The layer for `equinox.nn.Embedding`."""

import equinox as eqx
import jax
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray

from .._methods import AbstractLoraWeight
from .calls import check_unstacked
from .kinds import find_matrix_axes, register
from .layer import AbstractLoraLayer


@register({"weight": find_matrix_axes})
class LoraEmbedding(AbstractLoraLayer):
    """An `equinox.nn.Embedding` with a factored table."""

    wrapped: eqx.nn.Embedding

    adapts = (eqx.nn.Embedding,)
    by_default = False
    has_dropout = False
    takes_quantised = True
    is_lookup = True

    def __call__(
        self, x: Int[ArrayLike, ""], *, key: PRNGKeyArray | None = None
    ) -> Array:
        """**Arguments:**

        - `x`: The index, an integer of shape `()`. Use `jax.vmap` for several.
        - `key`: Ignored.

        **Returns:**

        An array of shape `(embedding_size,)` and of the dtype of the table.

        **Raises:**

        `ValueError` if the layer is a stack of layers, or if `x` is not a scalar.
        """
        embedding = self.wrapped
        if isinstance(embedding.weight, AbstractLoraWeight):
            check_unstacked(embedding, embedding.weight, 2)
        # The layer only indexes its table, and a factored weight can be indexed.
        with jax.named_scope("lorax.LoraEmbedding"):
            return embedding(x, key=key)
