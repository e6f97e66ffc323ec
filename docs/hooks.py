"""What MkDocs does beyond its plugins: names of the library in text lead to the API.

`lorax.x` in inline code, on any page and in any docstring, becomes a link to the entry
of `x`. Blocks of code and headings stay as they are. A name that does not exist, or
that no API page has, is a warning, which fails `mkdocs build --strict`. The first page
of the API has a table of all names.
"""

import logging
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.utils import get_relative_url


log = logging.getLogger("mkdocs.hooks.lorax")

_ROOT = Path(__file__).parent.parent
_ENTRY = re.compile(r"^::: lorax\.(\S+)\n((?:    .*\n|\n(?=    ))*)", re.MULTILINE)
_HIDDEN = re.compile(r"^<!--\n```python\n.*?^-->\n", re.MULTILINE | re.DOTALL)
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:examples|benchmarks|tests)/|[A-Z]+\.md)")
_NAME = re.compile(r"(?<![\w.])lorax(?:\.[A-Za-z_]\w*)+")
# On API pages classes and types are also known without `lorax.`.
_NAME_IN_API = re.compile(rf"{_NAME.pattern}|(?<![\w.\"'])[A-Z]\w+(?![\w\"'])")
_TAG = re.compile(r"<(/?)([a-zA-Z][\w-]*)((?:\"[^\"]*\"|'[^']*'|[^>\"'])*)>")
_ID = re.compile(r'\sid="(lorax\.[^"]+)"')
_PRIVATE = re.compile(r'\stitle="eqx_lorax\.[^"]*"| \(eqx_lorax\._[^)"]*\)(?=")')
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_HEAD = re.compile(r"<th\b[^>]*>(.*?)</th>", re.DOTALL)
_CELL = re.compile(r"<td\b([^>]*)>(.*?)</td>", re.DOTALL)
# In these a name stays as it is.
_LEFT_ALONE = {"a", "pre", "script", "style", "h1", "h2", "h3", "h4", "h5", "h6"}

# The page and anchor of each entry, by name, of the build that goes on.
_entries: dict[str, tuple[str, str]] = {}
# What each name of the library is, in one sentence.
_names: dict[str, str] = {}


def on_config(config: Any) -> None:
    """Reads the public names of the package."""
    _entries.clear()
    _names.clear()
    _names.update(find_names())


def find_names() -> dict[str, str]:
    """All names that users may write, `lorax.x`, and `lorax.x.y` for what `x` has, each
    with the first sentence of its documentation."""
    extensions = griffe.load_extensions(str(Path(__file__).parent / "signatures.py"))
    paths = [str(_ROOT), str(_ROOT / "docs")]
    before = griffe.GriffeLoader(search_paths=paths)
    loader = griffe.GriffeLoader(search_paths=paths, extensions=extensions)
    before.load("eqx_lorax")
    loader.load("eqx_lorax")
    names = {}
    todo = [loader.load("lorax")]
    while todo:
        module = todo.pop()
        for name, member in module.members.items():
            path = f"{module.path}.{name}"
            names[path] = _first_sentence(member)
            if not isinstance(member, griffe.Alias):
                todo.append(member)
            elif member.is_class:
                # The extension takes attributes out of classes.
                whole = before.modules_collection[member.final_target.path]
                names |= {f"{path}.{x}": "" for x in whole.members if x[:1] != "_"}
    return names


def _first_sentence(member: Any) -> str:
    text = member.docstring.value if member.docstring is not None else ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.) (?=[A-Z])|(?<=:$)", first)[0]


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Links to files that are no pages lead to the repository. On API pages each entry
    is below the heading before it, and has its name without `lorax.` in the table of
    contents. What is hidden is left out: the code that the examples begin with."""
    markdown = _OUTSIDE.sub(rf"]({config.repo_url}/blob/main/\1", markdown)
    if not page.file.src_uri.startswith("api/"):
        return markdown
    if page.file.src_uri == "api/index.md":
        return markdown.replace("<!-- names -->", "\n".join(_list_names(config)))

    markdown = _HIDDEN.sub("", markdown)

    def set_options(entry: re.Match[str]) -> str:
        name, options = entry.groups()
        if "options:" not in options:
            options = f"    options:\n{options}"
        level = 3 if "\n## " in markdown[: entry.start()] else 2
        label = name.split(".")[-1] if _is_member(name) else name
        more = f"options:\n      toc_label: {label}\n      heading_level: {level}\n"
        options = options.replace("options:\n", more)
        return f"::: lorax.{name}\n{options}"

    return _ENTRY.sub(set_options, markdown)


def _list_names(config: Any) -> list[str]:
    """The table of all names, page by page in the order of the navigation."""
    (pages,) = [x["API"] for x in config.nav if "API" in x]
    lines = []
    for title, path in (pair for page in pages for pair in page.items()):
        entries = _ENTRY.finditer((Path(config.docs_dir) / path).read_text())
        found = [entry[1] for entry in entries if not _is_member(entry[1])]
        if path != "api/index.md":
            link = Path(path).relative_to("api").as_posix()
            lines += [f"## [{title}]({link})", "", "| name | what it is |", "|---|---|"]
            lines += [f"| `lorax.{x}` | {_names[f'lorax.{x}']} |" for x in found]
            lines += [""]
    return lines


def _is_member(name: str) -> bool:
    return "." in name and not name.split(".")[0].islower()


def on_page_context(context: Any, page: Any, **kwargs: Any) -> None:
    """A page that is alone in its section needs no list of the pages there."""
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Notes where the entries are."""
    for name in _ID.findall(html):
        _entries.setdefault(name, (page.url, name))
    return _TABLE.sub(lambda table: label_cells(table[0]), html)


def label_cells(table: str) -> str:
    """`table`, where it has many words, with the heading of its column in each cell.
    Narrow pages show the cells of a row below each other, see `assets/site.css`."""
    heads = [_TAG.sub("", head) for head in _HEAD.findall(table)]
    rows = [_CELL.findall(row) for row in table.split("<tr>")]
    longest = max((len(_TAG.sub("", x[1])) for row in rows for x in row[1:]), default=0)
    if len(heads) < 3 or longest <= 60:
        return table

    def label(row: str) -> str:
        left = iter(heads)
        return _CELL.sub(
            lambda cell: f'<td data-label="{next(left)}"{cell[0][3:]}', row
        )

    labelled = "<tr>".join(map(label, table.split("<tr>")))
    return labelled.replace("<table>", "<table data-words>", 1)


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Makes the links, when all entries are known."""
    start, end = output.find("<article"), output.find("</article>")
    linked = link_names(output[start:end], page.url, page.file.src_uri)
    return _PRIVATE.sub("", output[:start] + linked + output[end:])


def link_names(html: str, url: str, source: str) -> str:
    """`html` with links at the names in inline code."""
    pieces, position, left_alone, in_code = [], 0, 0, 0
    names = _NAME_IN_API if source.startswith("api/") else _NAME
    for tag in [*_TAG.finditer(html), None]:
        text = html[position : tag.start() if tag else None]
        if in_code and not left_alone:
            text = names.sub(lambda name: _link(name[0], url, source), text)
        pieces.append(text)
        if tag is None:
            break
        pieces.append(tag[0])
        position = tag.end()
        step = -1 if tag[1] else 1
        left_alone += step * (tag[2].lower() in _LEFT_ALONE)
        in_code += step * (tag[2].lower() == "code")
    return "".join(pieces)


def _link(text: str, url: str, source: str) -> str:
    name = text if text.startswith("lorax.") else f"lorax.{text}"
    if name not in _names:
        if name == text:
            log.warning(f"{source}: `{name}` does not exist.")
        return text
    # An attribute has no entry of its own: its class has it.
    for found in (name, name.rpartition(".")[0]):
        if found in _entries:
            page, anchor = _entries[found]
            path = "" if page == url else get_relative_url(page, url)
            return f'<a class="lorax-name" href="{path}#{anchor}">{text}</a>'
    log.warning(f"{source}: `{name}` has no entry on an API page.")
    return text
