"""A browser, and tabs in it that note what goes wrong."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

from tests.support.network import offline
from tests.support.project import PROJECT, run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/site" in item.path.as_posix() and not CHROMIUM:
            item.add_marker(pytest.mark.skip(reason="needs a browser: apt-get install chromium"))


@pytest.fixture(scope="module")
def browser():
    """A browser without a network, as are the programs that the tests with it start."""
    with offline(), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, "--disable-component-update"])
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser):
    """Return a function that opens a tab; its .problems are the console's errors, its .requests all addresses."""
    contexts = []

    def open_tab(**options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options}))
        tab = contexts[-1].new_page()
        tab.problems, tab.requests = [], []
        tab.on("console", lambda message: message.type == "error" and tab.problems.append(message.text))
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.on("request", lambda request: tab.requests.append(request.url))
        return tab

    yield open_tab
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def site():
    """The site of the project's pages, built in build/site."""
    done = run(PROJECT / "ci/site")
    assert done.returncode == 0, done.stdout + done.stderr
    return PROJECT / "build" / "site"
