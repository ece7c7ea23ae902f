"""What the site adds to the pages: cards, downloads, links to the glossary, and when a page last ran in CI."""

import html
import json
import os
import re
from pathlib import Path

import nbformat
from docutils import nodes

PROJECT = Path(__file__).resolve().parent.parent
RUN = PROJECT / "build" / "run.json"  # of the last tests, which write it
NOT_LINKED = nodes.title, nodes.reference, nodes.FixedTextElement, nodes.literal, nodes.raw


def slug(title):
    """Return the anchor that Jupyter gives to a heading."""
    return title.replace(" ", "-")


def prepare_notebook(name, text):
    """Return a notebook as JSON, with downloads below its title, and pictures and their texts as myst-nb wants them."""
    notebook = nbformat.reads(text, as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells)
    names = dict(re.findall(r'^(\w+) = "(.+)"$', source, re.MULTILINE))
    files = [names.get(file, file) for file in re.findall(r"^%%writefile \$?(\S+)", source, re.MULTILINE)]
    links = [f"{{download}}`{Path(file).name} </{file}>`" for file in (f"{name}.ipynb", *files)]
    notebook.cells[0].source += f"\n\n**Download:** {', '.join(links)}"
    for cell in notebook.cells:
        if cell.id == "pad-text":
            cell.source += "\n\nHere, on the site, [draw on this pad](../site/draw.md)."
        for file, data in cell.get("attachments", {}).items():
            cell.source = cell.source.replace(f"attachment:{file}", f"data:image/png;base64,{data['image/png']}")
        for output in cell.get("outputs", ()):
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return nbformat.writes(notebook)


def prepare_landing_page(text):
    """Return the README with cards in place of its table of pages, the tarball, and the order of the pages."""
    pages = dict(re.findall(r"^\| \[.+?\]\((notebooks/\w+)\.ipynb\) .*\| (.+) \|$", text, re.MULTILINE))
    cards = []
    for name, shown in pages.items():
        source = nbformat.read(PROJECT / f"{name}.ipynb", as_version=4).cells[0].source
        title, rows = source.split("\n")[0], f"{shown}\n\n"
        for what, value in re.findall(r"^\| (\*\*(?:For whom|Time|Needs)\*\*) \| (.+) \|$", source, re.MULTILINE):
            rows += f"{what}: " + re.sub(r"\[(.+?)\]\(.+?\)", r"\1", value) + "\n\n"
        cards += [f":::{{grid-item-card}} {title[2:]}", f":link: /{name}", ":link-type: doc", rows, ":::"]
    cards += [
        ":::{grid-item-card} Draw a digit",
        ":link: /site/draw",
        ":link-type: doc",
        "The network reads it.",
        ":::",
    ]
    grid = "\n".join(["::::{grid} 1 1 2 2", ":gutter: 3", *cards, "::::\n"])
    text = re.sub(r"^\| page \|.*\n(\|.*\n)+\n.*cores\. ", lambda _: f"{grid}\n", text, flags=re.MULTILINE)
    if tarball := os.environ.get("TARBALL"):
        link = f"{{download}}`Download the project </{tarball}>`, unpack it, and run"
        text = text.replace("## Start here\n", f"## Start here\n\n{link}\n")
    rest = "site/*", "benchmarks/README", "ci/cluster/README", "CONTRIBUTING"
    return "\n".join([text, "```{toctree}", ":hidden:", ":glob:", *pages, *rest, "```"])


def describe(page):
    """Return in words how a page ran in the last tests."""
    if not page["ran"]:
        return "not run, or not to its end"
    left_out = [f"left out: {step} ({why})" for step, why in page["left_out"].items()]
    return "; ".join(filter(None, [f"it ran in {page['seconds']} s", page["accuracy"], *left_out]))


def status(run):
    """Return what each page did in the last tests, in Markdown."""
    if not run:
        return "This site was built without a run of the tests, so there is nothing to report."
    rows = [f"| [](/notebooks/{name}.ipynb) | {describe(page)} |" for name, page in run["pages"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return "\n".join(
        [f"Commit `{run['commit']}`, with {versions}:\n", "| page | what happened |", "| --- | --- |", *rows]
    )


def prepare(app, name, source):
    """Change the text of a document before it is parsed."""
    if name == app.config.root_doc:
        source[0] = prepare_landing_page(source[0])
    elif name.startswith("notebooks/"):
        source[0] = prepare_notebook(name, source[0])
    elif name == "site/status":
        source[0] += status(app.config.run)


def link_terms(app, document, name):
    """Link the first use of each term of the glossary on a page to its explanation there."""
    if not name.startswith("notebooks/"):
        return
    objects = app.env.domaindata["std"]["objects"]
    terms = {
        re.sub("[ -]", " ", term.lower()): anchor for (kind, term), (_, anchor) in objects.items() if kind == "term"
    }
    longest_first = "|".join(sorted(map(re.escape, terms), key=len, reverse=True)).replace("\\ ", r"[\s-]")
    for text in list(document.findall(nodes.Text)):
        pieces, end, parent = [], 0, text.parent
        while parent and not isinstance(parent, NOT_LINKED):
            parent = parent.parent
        for match in [] if parent else re.finditer(rf"\b({longest_first})(?:e?s)?\b", text, re.IGNORECASE):
            if anchor := terms.pop(re.sub(r"[\s-]", " ", match[1].lower()), None):
                address = f"{app.builder.get_relative_uri(name, 'site/glossary')}#{anchor}"
                link = nodes.reference("", match[0], refuri=address, classes=["glossary-term"])
                pieces, end = [*pieces, nodes.Text(text[end : match.start()]), link], match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def add_stamp(app, name, template, context, document):
    """Say at the end of each page when the last tests were, and how the page ran in them; site.js adds how long ago."""
    stamp, run = "Built without a run of the tests.", app.config.run
    if run:
        page = run["pages"].get(Path(name).name)
        when = f'<time datetime="{run["date"]}">{run["date"][:10]}</time>'
        stamp = f"Last tests: {when}{html.escape(f': {describe(page)}' if page else '')}."
    link = f'<a href="{context["pathto"]("site/status")}">Status of all pages</a>'
    context["body"] = f'{context.get("body", "")}<p class="stamp">{stamp} {link}</p>'


def setup(app):
    app.add_config_value("run", json.loads(RUN.read_text()) if RUN.exists() else {}, "")
    app.connect("source-read", prepare)
    app.connect("doctree-resolved", link_terms)
    app.connect("html-page-context", add_stamp)
