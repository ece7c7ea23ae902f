"""The site of the pages, in a browser."""

import functools
import http.server
import re
import threading
from collections import Counter
from html import unescape
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.site.strokes import PHONE
from tests.support.pages import PROJECT, cell, figures, read
from tests.support.project import run

NOTEBOOKS = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))
NAMES = ["index", *(f"notebooks/{name}" for name in NOTEBOOKS), "site/draw", "site/glossary", "site/status"]
NAMES += ["ci/cluster/README", "benchmarks/README", "CONTRIBUTING"]
LOOKS = {"light": {}, "dark": {"color_scheme": "dark"}, "phone": PHONE}
WCAG = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
RULES = {"light": WCAG, "dark": {"runOnly": ["color-contrast"]}}  # what a look may change
RULES["phone"] = {"runOnly": ["scrollable-region-focusable", "target-size"]}
PRELOAD = {"preload": False, "resultTypes": ["violations"]}  # else style sheets are asked for, an error in a folder
LESS_CODE = "document.querySelectorAll('.highlight').forEach((code, i) => i < 5 || code.remove())"
SCREENSHOTS = PROJECT / "build" / "screenshots"
pytestmark = pytest.mark.slow


def attributes(html, name):
    """Return the values of an attribute in a page's HTML; name: a regular expression."""
    return [unescape(value) for value in re.findall(rf'(?<=\s)(?:{name})="([^"]*)"', html)]


def test_every_page_is_complete(site):
    """With all its figures and their texts, the files that it writes, and the record of its run."""
    landing = (site / "index.html").read_text()
    assert landing.count("sd-card-title") == len(NOTEBOOKS) + 1 and all(
        (site / f"{name}.html").exists() for name in NAMES
    )
    assert (PROJECT / ".git").exists() == bool(re.search(r'href="_downloads/\w+/mnist-tutorial-.*\.tar\.gz"', landing))
    for name in NOTEBOOKS:
        html, page = (site / f"notebooks/{name}.html").read_text(), read(name)
        assert {figure.metadata["image/png"]["alt"] for figure in figures(page)} <= {*attributes(html, "alt")}
        downloads = [unquote(address).split("/")[-1] for address in attributes(html, "href") if "_downloads" in address]
        written = [each for each in page.cells if each.source.startswith("%%writefile")]
        assert downloads[0] == f"{name}.ipynb" and len(downloads) == 1 + len(written)
        assert f'href="notebooks/{name}.html"' in landing and html.count('class="stamp"') == 1
        links = Counter(re.findall(r'href="\.\./site/glossary\.html#([^"]+)"', html))
        assert len(links) >= 5 and {*links.values()} == {1}, name  # each term once


def test_no_link_is_dead_and_no_figure_without_a_text(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    anchors = {path: {*attributes(html, "id")} for path, html in pages.items()}
    for path, html in pages.items():
        assert not re.findall(r'<img(?![^>]* alt="[^"]+")[^>]*>', html), path
        for link in attributes(html, "href|src"):
            file, anchor = urldefrag(link)
            if not re.match(r"\w+:", link):
                target = (path.parent / unquote(file.partition("?")[0])).resolve() if file else path
                assert target.exists() and (not anchor or unquote(anchor) in anchors.get(target, anchor)), (path, link)


@pytest.mark.parametrize("look", LOOKS)
def test_every_page_opens(site, open_tab, look):
    """From the folder: no error, no request to another address, no sideways scrolling, no violation of WCAG."""
    tab = open_tab(**LOOKS[look])
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        tab.goto((site / f"{name}.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, name
        tab.screenshot(path=SCREENSHOTS / f"{name.replace('/', '-')}-{look}.png")
        if look != "phone":
            tab.evaluate(LESS_CODE)  # which has the same colours everywhere; to look at all of it takes minutes
        found = Axe().run(tab, options=RULES[look] | PRELOAD).response["violations"]
        assert not found, (name, [(each["id"], each["nodes"][0]["html"], len(each["nodes"])) for each in found])
    assert not tab.problems and all(url.startswith(("file:", "data:")) for url in tab.requests)


def test_search_finds_pages_and_terms(site, open_tab):
    class Handler(http.server.SimpleHTTPRequestHandler):
        log_message = print

    tab = open_tab()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for word, found in ("checkpoint", "notebooks/failures"), ("all-reduce", "site/glossary.html#term-all-reduce"):
            tab.goto(f"{address}/index.html")
            tab.get_by_placeholder("Search").fill(word)
            tab.keyboard.press("Enter")
            tab.locator(f'#search-results a[href*="{found}"]').first.wait_for()
        server.shutdown()
    assert not tab.problems and all(url.startswith(address) for url in tab.requests)


@pytest.mark.parametrize("script", [True, False])
def test_answers_and_solutions_are_folded(site, open_tab, script):
    """By the keyboard alone one opens them; they need no script."""
    tab = open_tab(java_script_enabled=script)
    for name in NOTEBOOKS:
        tab.goto((site / f"notebooks/{name}.html").as_uri())
        answers = tab.locator("details.hide")
        assert answers.count() == sum("hide-output" in c.metadata.get("tags", []) for c in read(name).cells) > 0
        texts = [tab.get_by_text(what, exact=True) for what in ("Hint", "Solution")]
        for details in (answers.first, *(tab.locator("details", has=text).first for text in texts)):
            content = details.locator(":scope > :not(summary)").first
            assert not content.is_visible()
            details.locator("summary").press("Enter")
            assert content.is_visible()


def test_record_of_a_run(site, open_tab):
    """Where the tests have run pages, each page says when that was and how long ago."""
    tab = open_tab()
    tab.goto((site / "site/status.html").as_uri())
    record = PROJECT / "build/run.json"
    if record.exists() and record.stat().st_mtime < (site / "index.html").stat().st_mtime:
        assert tab.locator("article tbody tr").count() == len(NOTEBOOKS)
        assert re.search(r"\((today|\d+ days? ago|yesterday)\)", tab.locator(".stamp").inner_text())
    else:
        assert "without a run of the tests" in tab.locator("article").inner_text()


def test_a_broken_site_is_not_built(ready):
    page = read("flyte", ready)
    cell("title", page).source += "\n\n[nowhere](mnist.ipynb#Nowhere)"
    nbformat.write(page, ready / "notebooks/flyte.ipynb")
    done = run(ready / "ci/site")
    assert done.returncode and "Nowhere" in done.stderr and not (ready / "build/site").exists()
