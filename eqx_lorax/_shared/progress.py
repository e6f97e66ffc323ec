"""Progress bars, where tqdm is installed."""

from collections.abc import Iterable, Iterator
from typing import Any


def follow(
    items: Iterable[Any], progress: bool | None, *, title: str, unit: str
) -> Iterator[Any]:
    """The items, with a progress bar.

    **Arguments:**

    - `progress`: Whether there is one. `None` is for one on terminals where tqdm is
        installed.

    **Raises:**

    `ImportError` if there has to be one, and tqdm is not installed.
    """
    if progress is False:
        return iter(items)
    try:
        from tqdm import tqdm
    except ImportError:
        if progress is None:
            return iter(items)
        raise ImportError(
            "`progress=True` shows a bar of tqdm, which is not installed: `pip install "
            "tqdm`. Or leave `progress` out."
        ) from None
    # Of `disable`, `None` means where there is no terminal.
    disable = None if progress is None else False
    return iter(tqdm(items, desc=title, unit=unit, disable=disable))
