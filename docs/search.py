"""What the search of the site finds besides the words of its pages, for MkDocs.

Words that are spelt in another way elsewhere, and other words for what a page is about,
are in the index with the page, and are shown nowhere. Guides come before the API.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority


log = logging.getLogger("mkdocs.hooks.search")

# Other words for pages and their sections.
ALSO = {
    "": "quickstart getting started",
    "#installation": "install pip requirements version license licence git clone",
    "mental-model/": "quickstart getting started introduction",
    "mental-model/#training": "train",
    "mental-model/#taking-them-out": "merge unmerge fuse",
    "changelog/": "changelog release notes history version",
    "materialised/": "dense weight",
    "many-adapters/": "multi-lora multiple adapters serving batched switching",
    "quantised/": "quantization qlora bits and bytes",
    "saving/": "save adapter load checkpoint safetensors",
    "saving/#to-and-from-peft": "export to peft import convert",
    "sharding/": "sharding mesh",
    "from-peft/#files": "export to peft",
    "faq/#not-adapted": "not adapted warning",
    "faq/#was-trained-on-another-base-than": "trained on another base",
    "api/adapting/#lorax.unloraify": "merge unmerge fuse",
    "api/peft/#lorax.peft.save": "export to peft",
    "api/saving/#lorax.save_adapter": "save adapter",
}
# How much more, or less, an entry counts than others. The longest beginning decides.
WEIGHT = {
    "": 1.0,
    "api/": 0.4,
    "api/adapting/#lorax.loraify": 1.5,
    "api/adapting/#lorax.unloraify": 1.5,
    "api/peft/#lorax.peft.save": 1.0,
    "api/peft/#lorax.peft.save_weights": 0.4,
    "api/saving/#lorax.save_adapter": 1.5,
    "architecture/": 0.7,
    "changelog/": 0.1,
    "faq/#not-adapted": 2.0,
}
# `also` counts as a title does, and `spelt` as text.
FIELDS = {"also": {"boost": 1000.0}, "spelt": {"boost": 1.0}}

_VERB = re.compile(
    r"\b((?:de|re|un)?(?:initial|material|normal|optim|orthogonal|parallel|quant|regular"
    r"|serial|summar|token|vector))(is|iz)(e[drs]?|ers|ing|ations?)\b",
    re.IGNORECASE,
)


def spelt(text: str) -> str:
    """The words of `text` that others spell with the other one of `s` and `z`."""
    other = {"is": "iz", "iz": "is"}
    found = [a + other[b] + c for a, b, c in _VERB.findall(text.lower())]
    return " ".join(sorted(set(found)))


def extend(entries: list[dict[str, Any]]) -> None:
    """Adds to the entries of an index what is above."""
    for entry in entries:
        where = entry["location"]
        entry["also"] = f"{ALSO.get(where, '')} {spelt(entry['title'])}".strip()
        entry["spelt"] = spelt(re.sub(r"<[^>]*>", " ", entry["text"]))
        entry["boost"] = WEIGHT[
            max((x for x in WEIGHT if where.startswith(x)), key=len)
        ]
    there = {entry["location"] for entry in entries}
    for where in sorted({*ALSO, *WEIGHT} - there - {"", "api/"}):
        log.warning(f"docs/search.py: the site has no {where}.")


@event_priority(-100)  # after the index was written
def on_post_build(config: Any, **kwargs: Any) -> None:
    file = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(file.read_text())
    index["config"]["fields"] |= FIELDS
    extend(index["docs"])
    file.write_text(json.dumps(index, separators=(",", ":")))
