"""Where weights were formed densely, and how the user hears of it."""

import dataclasses
import warnings
from typing import Any, Literal, TypeAlias


OnMaterialise: TypeAlias = Literal["allow", "warn", "error"]
"""What `lorax.lora` does where it has to form a whole weight."""


class MaterialiseWarning(UserWarning):
    """A dense weight was formed where a factored one could not be used.

    !!! example

        ```python
        warnings.simplefilter("error", lorax.MaterialiseWarning)  # to find where
        ```
    """


@dataclasses.dataclass(frozen=True)
class Materialised:
    """A place where a weight was formed densely."""

    primitive: str
    """What JAX calls the operation."""

    shape: tuple[int, ...]
    """The shape of the weight."""

    reason: str
    """Why it could not stay factored."""

    at: tuple[str, int] | None
    """The file and the line of the user's call, if it is known."""

    def __str__(self) -> str:
        where = "" if self.at is None else f" at {self.at[0]}:{self.at[1]}"
        return (
            f"`{self.primitive}`{where} forms the dense {self.shape} weight, base plus "
            f"update, in each call, because {self.reason}. The result is right, and "
            "takes the memory of a dense weight."
        )


# What Python asks for in order to show a warning once a place.
_registry: dict[Any, Any] = {}


class Report:
    """What was materialised, each place once."""

    def __init__(self, on_materialise: OnMaterialise, advice: str = ""):
        self.found: dict[Materialised, None] = {}
        self._on_materialise = on_materialise
        self._advice = advice

    @property
    def raises(self) -> bool:
        return self._on_materialise == "error"

    def add(self, new: Materialised) -> None:
        """Warns or raises, as if the user's own line did."""
        if new in self.found:
            return
        self.found[new] = None
        message = f"{new} {self._advice}"
        if self.raises:
            raise MaterialiseWarning(message)
        if self._on_materialise == "warn":
            file, line = new.at or ("<unknown>", 0)
            warnings.warn_explicit(
                message, MaterialiseWarning, file, line, registry=_registry
            )
