"""Parts of messages."""

from collections.abc import Iterable


def list_some(items: Iterable[str], limit: int = 8, separator: str = ", ") -> str:
    """The first of the items, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
