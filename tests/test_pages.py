"""What holds for the committed state of every page."""
import json
import re
from pathlib import Path

import nbformat
import pytest
from test_page import text

PROJECT = Path(__file__).resolve().parents[1]
PAGES = sorted((PROJECT / "notebooks").glob("*.ipynb"))
FIGURES = {"mnist": 9, "flyte": 4, "lightning": 4}  # at least


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def page(request):
    notebook = nbformat.read(request.param, as_version=4)
    notebook.name = request.param.stem
    return notebook


@pytest.fixture
def code(page):
    return [cell for cell in page.cells if cell.cell_type == "code"]


@pytest.fixture
def outputs(code):
    return [output for cell in code for output in cell.outputs]


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
    assert "papermill" not in page.metadata and not any(
        {"papermill", "execution"} & cell.metadata.keys() for cell in page.cells)
    streams = [sum(output.output_type == "stream" for output in cell.outputs) for cell in code]
    assert max(streams) == 1  # printed lines are one output, not one each


def test_every_figure_has_an_alternative_text(page, outputs):
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) >= FIGURES[page.name]
    assert all(len(figure.metadata["image/png"]["alt"]) > 20 for figure in figures)


def test_links_lead_somewhere(page):
    """To files, and to headings of this page or another."""
    for cell in page.cells:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", cell.source if cell.cell_type == "markdown" else ""):
            file, _, heading = target.partition("#")
            other = nbformat.read(PROJECT / "notebooks" / file, as_version=4) if file else page
            prose = "\n".join(each.source for each in other.cells if each.cell_type == "markdown")
            titles = re.findall("^#+ (.+)$", prose, re.MULTILINE)
            assert not heading or heading in [title.replace(" ", "-") for title in titles], target
