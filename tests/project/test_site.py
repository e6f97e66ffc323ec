"""The site as its readers see it: in a browser, wide and narrow, light and dark.

They need the extra `site`, and Chromium, as Debian has it.
"""

import contextlib
import functools
import html.parser
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from paths import ROOT


pytestmark = pytest.mark.site

HOME = "/eqx-lorax/"
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
SCHEMES = {"light": "default", "dark": "slate"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site: `LORAX_SITE`, or a new one."""
    if given := os.environ.get("LORAX_SITE"):
        return Path(given)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run([*command, "--site-dir", folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """The paths of all pages, from the root of the site."""
    found = [x.relative_to(site).as_posix() for x in site.rglob("*.html")]
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    assert len(found) >= len(sources) > 30
    return sorted(found)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site where its `site_url` has it, below `HOME`."""

    def translate_path(self, path):
        assert path.startswith(HOME), path
        return super().translate_path("/" + path.removeprefix(HOME))

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def host(site):
    """The address of a server of the site."""
    handler = functools.partial(_Handler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path is not None, "Install Chromium: `apt-get install chromium`."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def _open_tab(browser, host):
    """A new tab, with a list of all that goes wrong in it."""
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    wrong = []

    def note_request(request):
        if not request.url.startswith((host, "data:", "blob:")):
            wrong.append(f"asks for {request.url}")

    def note_response(response):
        if response.status >= 400:
            wrong.append(f"has no {response.url}")

    page.on("request", note_request)
    page.on("response", note_response)
    page.on("pageerror", lambda error: wrong.append(f"raises {error}"))
    page.on(
        "console",
        lambda message: (
            wrong.append(f"says {message.text}")
            if message.type in ("error", "warning")
            else None
        ),
    )
    yield page, wrong
    context.close()


@pytest.fixture
def tab(browser, host):
    with _open_tab(browser, host) as (page, wrong):
        yield page, wrong


@pytest.fixture(scope="module")
def module():
    """Loads a module of the folder `docs`."""

    def load(name):
        path = ROOT / "docs" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"site_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# What a reader would have to scroll the page sideways for, or would never see.
LOOK = """
() => {
  const width = document.documentElement.clientWidth, wrong = [];
  if (document.documentElement.scrollWidth > width)
    wrong.push(`is ${document.documentElement.scrollWidth} pixels wide`);
  for (const image of document.images)
    if (!image.complete || image.naturalWidth === 0)
      wrong.push(`does not show ${image.src}`);
    else if (!image.alt)
      wrong.push(`does not say what ${image.src} shows`);
  const scrolls = element => {
    for (let x = element; x.tagName !== "ARTICLE"; x = x.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(x).overflowX)) return true;
    return false;
  };
  for (const element of document.querySelectorAll("article *")) {
    const box = element.getBoundingClientRect();
    if (box.width > 1 && box.right > width + 1 && !scrolls(element.parentElement)) {
      wrong.push(`cuts <${element.tagName.toLowerCase()} class="${element.className}">`
        + ` ${element.textContent.trim().slice(0, 60)}`);
      break;
    }
  }
  return wrong;
}
"""


@pytest.mark.parametrize(
    "content, problems",
    [
        ("<p>short</p>", []),
        ("<div style='overflow: auto'><p style='width: 3000px'>x</p></div>", []),
        ("<p style='width: 3000px'>x</p>", ["is 3008 pixels wide", "cuts <p"]),
        (
            "<div style='overflow: hidden'><p style='width: 3000px'>x</p></div>",
            ["cuts"],
        ),
        ("<img src='/eqx-lorax/nowhere.png'>", ["does not show"]),
        ("<img src='/eqx-lorax/assets/logo.svg'>", ["does not say"]),
    ],
)
def test_what_is_wrong_is_seen(content, problems, tab, host):
    page, _ = tab
    head = f"<!doctype html><base href='{host}'>"
    page.set_content(f"{head}<article>{content}</article>")
    found = page.evaluate(LOOK)
    assert len(found) == len(problems)
    assert all(x.startswith(y) for x, y in zip(found, problems))


def test_what_is_asked_for_is_seen(tab, host):
    page, wrong = tab
    page.goto(host + HOME)
    assert not wrong
    page.evaluate("fetch('nowhere.png')")
    assert wrong[0] == f"has no {host}{HOME}nowhere.png"
    wrong.clear()
    page.evaluate("fetch('https://elsewhere.invalid/').catch(() => console.error(1))")
    assert {"asks for https://elsewhere.invalid/", "says 1"} <= set(wrong)


def test_every_page_fits_and_loads(pages, tab, host):
    page, wrong = tab
    problems = []
    for path in pages:
        wrong.clear()
        page.goto(host + HOME + path.removesuffix("index.html"))
        for scheme, name in SCHEMES.items():
            page.emulate_media(color_scheme=scheme)
            page.wait_for_selector(f"body[data-md-color-scheme={name}]")
            for size, (width, height) in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                found = page.evaluate(LOOK)
                problems += [f"{path}, {size}, {scheme}: {x}" for x in found]
        problems += [f"{path}: {x}" for x in wrong]
    assert not problems, "\n" + "\n".join(problems)


def test_a_choice_of_colours_is_kept(tab, host):
    page, wrong = tab
    page.goto(host + HOME)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for _ in range(2):  # from what the system has to light, and from there to dark
        page.click("form[data-md-component=palette] label:not([hidden])")
    page.wait_for_selector("body[data-md-color-scheme=slate]")
    page.goto(host + HOME + "mental-model/")
    page.wait_for_selector("body[data-md-color-scheme=slate]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert not wrong


@pytest.fixture(scope="module")
def search(browser, host):
    """What a reader finds who types some words: of each page the page itself, and those
    of its sections that are shown."""
    with _open_tab(browser, host) as (page, wrong):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(host + HOME)

        def find(words):
            page.focus(".md-search__input")
            page.keyboard.press("Control+A")
            page.keyboard.press("Backspace")
            page.wait_for_selector(".md-search-result__meta >> text=Type to start")
            page.keyboard.insert_text(words)
            page.keyboard.press("Shift")  # the search waits for a key to come up
            page.wait_for_function(FOUND)
            assert not wrong
            links = page.evaluate(RESULTS)
            return [
                [re.sub(r"\?[^#]*", "", x.removeprefix(host + HOME)) for x in group]
                for group in links
            ]

        yield find


FOUND = """
() => document.querySelector(".md-search-result__item")
  || document.querySelector(".md-search-result__meta").textContent.includes("No match")
"""
RESULTS = """
() => [...document.querySelectorAll(".md-search-result__item")].map(item => [
  ...item.querySelectorAll(":scope > a, :scope > details[open] a")
].map(link => link.href))
"""


@pytest.mark.parametrize(
    "words, where",
    [
        ("install", "#installation"),
        ("pip install", "#installation"),
        ("requirements", "#installation"),
        ("license", "#installation"),
        ("quickstart", ""),
        ("getting started", "mental-model/"),
        ("changelog", "changelog/"),
        ("merge", "mental-model/#taking-them-out"),
        ("merge", "api/adapting/#lorax.unloraify"),
        ("save adapter", "saving/"),
        ("save adapter", "api/saving/#lorax.save_adapter"),
        ("export to peft", "saving/#to-and-from-peft"),
        ("export to peft", "api/peft/#lorax.peft.save"),
        ("trained on another base", "faq/#was-trained-on-another-base-than"),
        ("not adapted", "faq/#not-adapted"),
        ("multi-lora", "many-adapters/"),
        ("quantize", "quantised/"),
        ("quantization", "quantised/"),
        ("materialize", "materialised/"),
        ("sharding", "sharding/"),
        ("LoRA+", "optimizers/#lora"),
        ("nf4", "quantised/"),
        ("loraify", "api/adapting/#lorax.loraify"),
        ("peft.save", "api/peft/#lorax.peft.save"),
        ("on_materialise", "materialised/"),
        ("save_adapter", "api/saving/#lorax.save_adapter"),
        ("also", "mental-model/#where-also-is-needed"),
        ("head not saved", "faq/#my-new-head-is-not-trained-or-is-lost-on-saving"),
        ("how do i save an adapter", "api/saving/#lorax.save_adapter"),
    ],
)
def test_search_finds(words, where, search):
    """It is on one of the first three pages, and there among the first."""
    found = search(words)
    assert where in [x for group in found[:3] for x in group[:3]], found[:5]


def test_search_does_not_find_what_is_nowhere(search):
    assert search("zzyzx") == []


def test_search_knows_two_spellings(module):
    text = "Quantised, initialization and Materialising; a size, a prize, a promise"
    assert module("search").spelt(text) == "initialisation materializing quantized"


def test_search_knows_only_what_is_there(module, caplog):
    search = module("search")
    entries = [{"location": "x/", "title": "<code>x</code> quantised", "text": "a"}]
    search.extend(entries)
    assert entries[0] | {"also": "quantized", "spelt": "", "boost": 1.0} == entries[0]
    messages = [x.getMessage() for x in caplog.records]
    assert "docs/search.py: the site has no saving/." in messages


class _Reader(html.parser.HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.targets = {"", "__skip"}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[x] for x in ("id", "name") if found.get(x)}
        names = {"a": "href", "img": "src", "link": "href", "script": "src"}
        if tag in names and found.get(names[tag]):
            self.targets.append(found[names[tag]])


def test_links_and_anchors_lead_somewhere(site, pages):
    read = {path: _Reader((site / path).read_text()) for path in pages}
    problems, count = [], 0
    for path, reader in read.items():
        for target in reader.targets:
            parts = urlsplit(urljoin(f"https://here{HOME}{path}", target))
            if parts.netloc != "here" or parts.scheme != "https":
                continue
            count += 1
            file = unquote(parts.path).removeprefix(HOME)
            if file.endswith("/") or not file:
                file += "index.html"
            anchor = unquote(parts.fragment)
            if not (site / file).is_file():
                problems.append(f"{path}: {target} is nowhere")
            elif anchor and file in read and anchor not in read[file].anchors:
                problems.append(f"{path}: {target} has no such anchor")
    assert count > 1000
    assert not problems, "\n" + "\n".join(sorted(set(problems)))


def test_api_pages_have_public_names_alone(site):
    problems = []
    for page in sorted((site / "api").rglob("*.html")):
        for found in re.findall(r"eqx_lorax\._\w+[\w.]*", page.read_text()):
            problems.append(f"{page.parent.name}: {found}")
    assert not problems, "\n" + "\n".join(sorted(set(problems)))


@pytest.fixture(scope="module")
def hooks(module):
    """The hooks of the site, after a build that knows of one entry."""
    module = module("hooks")
    module._names |= {"lorax.plan": "", "lorax.Plan": "", "lorax.Plan.total": ""}
    for name in ("lorax.plan", "lorax.Plan"):
        module._entries[name] = ("api/planning/", name)
    return module


@pytest.mark.parametrize(
    "given, expected",
    [
        ("<p><code>lorax.plan</code>", "<p><code>@lorax.plan</a></code>"),
        ("<code>lorax.plan(loss)</code>", "<code>@lorax.plan</a>(loss)</code>"),
        ("<code>lorax.Plan.total</code>", "<code>@lorax.Plan.total</a></code>"),
        ("<p>lorax.plan", None),
        ("<h2><code>lorax.plan</code></h2>", None),
        ("<pre><code>lorax.plan</code></pre>", None),
        ('<a href="x"><code>lorax.plan</code></a>', None),
        ("<code>eqx_lorax.plan</code>", None),
        ("<code>Plan</code>", None),
    ],
)
def test_a_name_becomes_a_link(given, expected, hooks, caplog):
    html = hooks.link_names(given, "speed/", "speed.md")
    link = re.compile(r'<a class="lorax-name" href="../api/planning/#lorax.[pP]lan">')
    assert link.sub("@", html) == (expected or given)
    assert not caplog.records


def test_api_pages_know_classes_by_their_short_names(hooks):
    html = hooks.link_names("<code>held: Plan</code>", "api/x/", "api/x.md")
    assert html.count("<a ") == 1 and 'href="../planning/#lorax.Plan"' in html


def test_a_name_that_does_not_exist_is_told(hooks, caplog):
    given = "<code>lorax.plann</code>"
    assert hooks.link_names(given, "speed/", "speed.md") == given
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.name.startswith("mkdocs.")
    assert record.getMessage() == "speed.md: `lorax.plann` does not exist."


LONG = "word " * 13


@pytest.mark.parametrize(
    "heads, cells, labelled",
    [
        (["a", "b", "<code>c</code>"], ["1", "2", LONG], ["a", "b", "c"]),
        (["a", "b", "c"], [LONG, "2", "3"], None),
        (["a", "b"], ["1", LONG], None),
    ],
)
def test_a_table_of_words_says_what_its_cells_are(heads, cells, labelled, hooks):
    def made(labels):
        top = "".join(f"<th>{x}</th>" for x in heads)
        row = "".join(f"<td{y}>{x}</td>" for x, y in zip(cells, labels))
        return f"<thead><tr>{top}</tr></thead><tr>{row}</tr><tr>{row}</tr></table>"

    plain = "<table>" + made([""] * 3)
    expected = plain
    if labelled is not None:
        expected = "<table data-words>" + made([f' data-label="{x}"' for x in labelled])
    assert hooks.label_cells(plain) == expected


def test_a_table_of_words_needs_no_columns_on_a_narrow_page(tab, host):
    page, wrong = tab
    for width, height in SIZES.values():
        page.set_viewport_size({"width": width, "height": height})
        page.goto(host + HOME + "from-peft/")
        table = page.locator("table[data-words]").first
        first, second = table.locator("tbody td").all()[:2]
        beside = first.bounding_box()["y"] == second.bounding_box()["y"]
        assert beside == (width > 1000)
        assert second.bounding_box()["x"] < width
        label = second.evaluate("x => getComputedStyle(x, '::before').content")
        assert label == ("none" if beside else '"here"')
    assert not wrong


def test_names_in_text_are_links(site):
    page = (site / "mental-model" / "index.html").read_text()
    assert '<code><a class="lorax-name" href="../api/adapting/#lorax.loraify">' in page
    text = re.sub(r"<(pre|h\d|a)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "<p>" in text and "<code>lorax." not in text
