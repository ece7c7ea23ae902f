"""What holds for the committed state of every page."""

import base64
import json
import re
import struct

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tests.support.pages import PROJECT, figures, read, solutions, text

PAGES = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))
CARD = "For whom", "Time", "Needs"
END = ["When it does not work", "Summary of this run", "Key points", "Exercises", "Next steps"]


@pytest.fixture(params=PAGES)
def page(request):
    notebook = read(request.param)
    notebook.name = request.param
    return notebook


@pytest.fixture
def code(page):
    return [cell for cell in page.cells if cell.cell_type == "code"]


@pytest.fixture
def prose(page):
    return "\n\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")


@pytest.fixture
def outputs(code):
    return [output for cell in code for output in cell.outputs]


def files(page):
    """Return what the cells of a page write by %%writefile, by the files' names."""
    source = "\n".join(cell.source for cell in page.cells if cell.cell_type == "code")
    names = dict(re.findall(r'^(\w+) = "(.+)"$', source, re.MULTILINE))
    cells = [cell.source.split("\n", 1) for cell in page.cells if cell.source.startswith("%%writefile ")]
    targets = [(magic.split()[1], content) for magic, content in cells]
    return {names[name[1:]] if name[0] == "$" else name: content + "\n" for name, content in targets}


def test_files_equal_their_cells(page):
    written = files(page)
    assert written
    for name, content in written.items():
        assert (PROJECT / name).read_text() == content, name


def test_every_program_and_job_is_written_by_a_page():
    written = {name for page in PAGES for name in files(read(page))}
    there = [*PROJECT.glob("*.py"), *PROJECT.glob("*.yaml"), *PROJECT.glob("jobs/*.y*ml"), *PROJECT.glob("jobs/*.py")]
    assert {str(path.relative_to(PROJECT)) for path in there} == written


def test_parameters_come_first_and_each_has_a_comment(code):
    assert code[0].metadata.tags == ["parameters"]
    assert all(re.fullmatch(r"\w+ = (\S+|\[.+\])  # .+", line) for line in code[0].source.splitlines())


def test_outputs_are_those_of_one_run(code, outputs):
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_outputs_hold_no_noise(page, code, outputs):
    assert not re.search(r"/(root|home|tmp|work|Users)/", json.dumps(page))
    assert not any(re.search("[\r\x1b]", text(cell)) for cell in code)
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", " ".join(map(str, outputs)))
    metadata = [page.metadata, *(cell.metadata for cell in page.cells)]
    assert not any({"papermill", "execution"} & keys.keys() for keys in metadata)
    # Printed lines are one output, not one each.
    assert max(sum(output.output_type == "stream" for output in cell.outputs) for cell in code) == 1


def test_every_figure_has_an_alternative_text_and_fits(page):
    assert len(figures(page)) >= 4 * (page.name != "dstack")
    for figure in figures(page):
        assert len(alt := figure.metadata["image/png"]["alt"]) > 20
        (width,) = struct.unpack(">I", base64.b64decode(figure.data["image/png"])[16:20])
        assert width <= 8.5 * 96, alt


def test_code_fits(page, code):
    for line in "\n".join(cell.source for cell in code if not cell.source.startswith("%%writefile")).splitlines():
        assert len(line) <= 88, line
    assert page.metadata.language_info.pygments_lexer == "ipython3"  # knows !kubectl and $variables


def test_form_of_a_lesson(page, prose):
    """A card at the top; at the end the reference, folded, and exercises with their solutions."""
    assert [word for word in CARD if f"| **{word}** |" in page.cells[0].source] == [*CARD]
    assert re.findall("^## (.+)$", prose, re.MULTILINE)[-len(END) :] == END
    assert "## When it does not work\n\n<details><summary>Messages, causes, remedies</summary>\n\n|" in prose
    code = solutions(nbformat.v4.new_markdown_cell(prose))
    assert [prose.count(f"<summary>{what}</summary>") for what in ("Hint", "Solution")] == [3, 3] and len(code) >= 3
    for solution in code:
        compile(TransformerManager().transform_cell(solution), page.name, "exec")


def test_answers_to_predictions_are_hidden(page):
    """On the site, by this tag: those of the cells between the question and the next text."""
    hidden, asked = [], False
    for cell in page.cells:
        if cell.cell_type == "markdown":
            asked = cell.id != "exercises" and re.search(r"\*\*(Predict|Before you)", cell.source)
        elif asked and cell.outputs:
            hidden.append(cell.id)
    assert hidden and hidden == [c.id for c in page.cells if "hide-output" in c.metadata.get("tags", [])]


def test_external_links(prose):
    links = set(re.findall(r"\]\((?!attachment:)(\w+:[^)]*)", prose))
    assert len(links) >= 5
    assert not [link for link in links if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", link)]


def test_links_lead_somewhere(page, prose):
    """To files, to headings of this page or another, and to pictures that are in the page."""
    attached = [name for cell in page.cells for name in cell.get("attachments", {})]
    assert re.findall(r"\]\(attachment:([^)]+)\)", prose) == attached
    for target in re.findall(r"\]\((?!http|attachment:)([^)]+)\)", prose):
        file, _, heading = target.partition("#")
        other = nbformat.read(PROJECT / "notebooks" / file, as_version=4) if file else page
        text = "\n".join(each.source for each in other.cells if each.cell_type == "markdown")
        titles = re.findall("^#+ (.+)$", text, re.MULTILINE)
        assert not heading or heading in [title.replace(" ", "-") for title in titles], target
