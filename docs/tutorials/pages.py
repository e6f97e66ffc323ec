"""Pages from the notebooks of the tutorials, for MkDocs.

Each notebook becomes a page like any other, with what it printed and drew. Pictures are
made for light pages and for dark ones.
"""

import base64
import json
from pathlib import Path
from typing import Any, TYPE_CHECKING


if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    from mkdocs.structure.files import File

    for file in [x for x in files if x.src_uri.endswith(".ipynb")]:
        files.remove(file)
        text = file.content_string
        name = Path(file.src_uri).stem
        folder = str(Path(file.src_uri).parent)
        copy = f"{folder}/download/{name}.ipynb"
        files.append(File.generated(config, copy, content=text))
        markdown, pictures = page(json.loads(text), name)
        for picture, content in pictures.items():
            where = f"{folder}/{picture}"
            files.append(File.generated(config, where, content=content))
        made = File.generated(config, file.src_uri, content=markdown)
        # A page, and not a file to be copied.
        made.is_documentation_page = lambda: True
        files.append(made)
    return files


def page(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """The page as Markdown, and the files of its pictures."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        block = f"```python\n{source}\n```"
        tags = cell["metadata"].get("tags", [])
        if "picture" in tags:
            block = '??? abstract "The code of the picture"\n\n' + _indented(block)
        parts.append(block)
        for output in cell["outputs"]:
            alt = cell["metadata"].get("alt", "A picture")
            parts += _shown(output, name, alt, pictures, "prose" in tags)
    title, _, rest = parts[0].partition("\n")
    links = (
        f"[Download the notebook](download/{name}.ipynb){{ .md-button download }} "
        f"[or the program]({name}.py){{ download }}"
    )
    if "run" in notebook["metadata"]:
        parts.append(f"*This page ran {notebook['metadata']['run']}.*")
    return "\n\n".join([title, rest.strip(), links, *parts[1:]]), pictures


def _shown(
    output: Any, name: str, alt: str, pictures: dict[str, bytes], is_prose: bool
) -> list[str]:
    if output["output_type"] == "stream":
        return [_text("".join(output["text"]), is_prose)]
    data = output["data"]
    number = len(pictures) // 2 + 1
    for kind, ending in (("image/svg+xml", "svg"), ("image/png", "png")):
        if kind not in data:
            continue
        raw = "".join(data[kind])
        shown = []
        for scheme in ("light", "dark"):
            file = f"{name}/{number}-{scheme}.{ending}"
            if ending == "svg":
                pictures[file] = _painted(raw, scheme).encode()
            else:
                pictures[file] = base64.b64decode(raw)
            shown.append(f"![{alt}]({file}#only-{scheme})")
        return ["\n".join(shown)]
    return [_text("".join(data["text/plain"]), is_prose)]


def _text(text: str, is_prose: bool) -> str:
    classes = ".text .output .no-copy" + " .prose" * is_prose
    return f"```{{ {classes} }}\n{text.rstrip()}\n```"


def _painted(picture: str, scheme: str) -> str:
    """A picture without its white card, in the ink of the page."""
    picture = picture.replace("#fefefe", "none")
    return picture.replace("#333333", "#d9dbe0") if scheme == "dark" else picture


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
