"""The pages in JupyterLab as a reader runs them: ci/lab, values typed, Run All Cells, Ctrl-C; without a network."""

import contextlib
import fcntl
import os
import re
import secrets
import subprocess
import termios
import time

import psutil
import pytest
from playwright.sync_api import expect

from tests.site.strokes import DIGITS, draw
from tests.support.network import found_in
from tests.support.pages import PROJECT, append_solutions, cell, figures, read, record, stable_outputs, text
from tests.support.project import clean_environment

PAGES = {  # what is typed
    "mnist": {"epochs": 1},
    "trainjob": {},
    "katib": {"max_trials": 2, "validation": 50_000},
    "failures": {"epochs": 2, "kills": 1},
    "flyte": {"epochs": 1, "learning_rates": [0.05, 0.1]},
    "lightning": {"epochs": 2, "share": 0.25},
    "dstack": {"epochs": 1, "share": 0.25},
}
soak = pytest.mark.skipif("not os.environ.get('SOAK')", reason="takes a quarter of an hour more: SOAK=1")
pytestmark = pytest.mark.slow


def wait(condition, log):
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@contextlib.contextmanager
def lab(project, folder, **variables):
    """Run ci/lab in a terminal, behind a SOCKS proxy; yield what it opens in a browser. At the end, press Ctrl-C."""
    program, opened, log = folder / "browser", folder / "opened.html", folder / "log.txt"
    program.write_text(f'#!/bin/sh\ncp "${{1#file://}}" "{opened}.part" && mv "{opened}.part" "{opened}"\n')
    program.chmod(0o755)
    variables |= {"BROWSER": program, "JUPYTER_CONFIG_DIR": folder / "config", "JUPYTER_DATA_DIR": folder / "data"}
    variables |= {"ALL_PROXY": "socks5://127.0.0.1:9", "KUBECONFIG": "no/such/kubeconfig"}
    environment = clean_environment(**variables)
    del environment["PYTEST_CURRENT_TEST"]  # as in tests.support.pages.run
    keyboard, terminal = os.openpty()
    with log.open("w") as file, open(keyboard, "wb", 0) as keyboard, open(terminal) as terminal:
        streams = {"stdin": terminal, "stdout": file, "stderr": file, "start_new_session": True}
        streams["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C there interrupts it
        command = [project / "ci/lab", "--allow-root", "--ServerApp.port=0"]
        server = subprocess.Popen(command, env=environment, **streams)
        try:
            wait(opened.exists, log)
            yield opened.read_text()
            kernels = psutil.Process(server.pid).children(recursive=True)
            keyboard.write(b"\x03")
            wait(lambda: "Shut down this Jupyter server (y/[n])?" in log.read_text(), log)
            keyboard.write(b"y\n")
            assert server.wait(30) == 0
            assert kernels and not psutil.wait_procs(kernels, timeout=10)[1]
            assert not [p for p in psutil.process_iter(["cwd"]) if (p.info["cwd"] or "").startswith(str(project))]
            assert not re.search(r"^\[E |WARNING|Traceback", log.read_text(), re.MULTILINE), log.read_text()
        finally:
            server.terminate()
            server.wait(30)


@pytest.mark.parametrize("name", ["mnist", *(pytest.param(name, marks=soak) for name in PAGES if name != "mnist")])
def test_page_in_jupyterlab(name, ready, tmp_path, open_tab):
    """The solutions of the exercises run, too, and the outputs of cells that do not vary are the committed ones."""
    append_solutions(ready, name)
    tab, key = open_tab(), secrets.token_hex(20)
    with lab(ready, tmp_path, **{"WANDB_API_KEY": key} if name == "mnist" else {}) as opened:  # others would go online
        url = re.search(r'href="(\S+)"', opened)[1]
        tab.goto(url.replace("mnist.ipynb", f"{name}.ipynb"))
        tab.locator("#jp-main-statusbar").get_by_text(re.compile(r"Python 3.*\| Idle$")).wait_for(timeout=120_000)
        for parameter, value in PAGES[name].items():
            tab.locator(".jp-CodeCell").first.locator(".cm-line", has_text=re.compile(f"^{parameter} = ")).click()
            tab.keyboard.press("Home")
            tab.keyboard.press("Shift+End")
            tab.keyboard.type(f"{parameter} = {value}")
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        indicator, begun = tab.locator(".jp-Notebook-ExecutionIndicator"), time.monotonic()
        expect(indicator).to_have_attribute("data-status", "busy", timeout=30_000)
        expect(indicator).to_have_attribute("data-status", "idle", timeout=1_200_000)
        seconds = time.monotonic() - begun
        with tab.expect_response(lambda response: response.request.method == "PUT" and name in response.url):
            tab.keyboard.press("Control+s")
        if name == "mnist":
            pad = tab.locator(".digit")
            for digit in 3, 7:
                pad.get_by_role("button", name="Clear").click()
                draw(tab, pad.locator(".pad"), DIGITS[digit])
                expect(pad.locator("output")).to_have_text(f"It reads a {digit}.", timeout=30_000)
        tab.screenshot(path=PROJECT / f"build/lab/{name}.png")
    ours = url.split("lab/")[0], "data:", "blob:", "attachment:"  # the last: in prose, before it is looked up
    assert not [request for request in tab.requests if not request.startswith(ours)]
    assert {*tab.problems} <= {"Failed to load resource: net::ERR_UNKNOWN_URL_SCHEME"}  # for the same reason
    page = read(name, ready)
    record(name, text(cell("what-ran", page)), seconds)
    code = [c for c in page.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [*range(1, len(code) + 1)]
    outputs = [output for c in code for output in c.outputs if "hostname of the client" not in str(output)]  # offline
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert all(figure.metadata["image/png"]["alt"] for figure in figures(page))
    assert name != "mnist" or len(figures(page)) >= 16
    assert not found_in(ready, key)
    if os.environ.get("MNIST_DIR"):
        committed = stable_outputs(read(name)).items()
        assert stable_outputs(page) == {where: out.replace("--epochs 5", "--epochs 1") for where, out in committed}
        assert re.search(r" ran .* 99\.\d\d% of MNIST| strikes survived", text(cell("what-ran", page)))
