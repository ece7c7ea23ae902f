"""The pad: the network in the browser and in the kernel, and digits that are drawn and read."""

import json
import os
from base64 import b64decode

import pytest
import torch
from playwright.sync_api import expect
from support.draw import Pad

import mnist
from tests.site.strokes import DIGITS, PHONE, draw
from tests.support.pages import cell, read, text

pytestmark = pytest.mark.slow


@pytest.fixture
def tab(site, open_tab, request):
    """The site's page, read from the folder; nothing may go wrong in it, and nothing else may be asked for."""
    tab = open_tab(**getattr(request, "param", {}))
    tab.goto((site / "site/draw.html").as_uri())
    tab.says = expect(tab.locator("output")).to_have_text
    yield tab
    assert not tab.problems and all(address.startswith(site.as_uri()) for address in tab.requests)


def clear(tab):
    tab.get_by_role("button", name="Clear").click()
    tab.says("Draw a digit from 0 to 9.")
    return tab.locator(".pad")


def test_the_same_answers_in_the_browser_in_the_kernel_and_by_pytorch(tab, data):
    model, (images, labels) = mnist.Net(), mnist.load(os.environ.get("MNIST_DIR", data), "t10k")
    for name, values in tab.evaluate("WEIGHTS").items():
        model.state_dict()[name].view(-1).copy_(torch.frombuffer(bytearray(b64decode(values)), dtype=torch.float32))
    pixels, pad = images[:200].flatten(1).tolist(), Pad(model, images[:10], labels[:10])
    kernel = torch.tensor([[*answer["logits"], *answer["maps"]] for answer in map(pad.read, pixels)])
    answers = "JSON.parse(images).map(network(WEIGHTS)).map(({ logits, maps }) => [...logits, ...maps])"
    browser = torch.tensor(json.loads(tab.evaluate(f"images => JSON.stringify({answers})", json.dumps(pixels))))
    assert model.training and (browser - kernel).abs().max() < 1e-3
    assert (browser[:, :10] - model.eval()(images[:200])).abs().max() < 1e-3
    if "MNIST_DIR" in os.environ:  # the weights are those of the page, but for what differs between machines
        right = 10_000 * mnist.test(model, images, labels, 1000)[1]
        assert abs(right - int(text(cell("model", read("mnist"))).split()[0])) < 3.5
    assert f"A {labels[9]}, read as a" in pad._repr_mimebundle_()[1]["image/png"]["alt"]


@pytest.mark.parametrize("tab, kind, digits", [
    ({}, "mouse", range(10)), ({}, "pen", (2, 5, 8)), (PHONE, "touch", (0, 3, 4, 6, 9))], indirect=["tab"])  # fmt: skip
def test_a_drawn_digit_is_read(tab, kind, digits):
    for digit in digits:
        draw(tab, clear(tab), DIGITS[digit], kind)
        tab.says(f"It reads a {digit}.")


def test_the_keyboard_draws_and_chooses(tab):
    clear(tab).focus()
    for digit, keys in (1, "U" * 9 + " " + "D" * 18 + " "), (7, "U" * 18 + "L" * 6 + " " + "R" * 12 + "DLD" * 9 + " "):
        for key in keys:
            tab.keyboard.press({"U": "ArrowUp", "D": "ArrowDown", "L": "ArrowLeft", "R": "ArrowRight"}.get(key, key))
        tab.says(f"It reads a {digit}.")
        tab.keyboard.press("Escape")
    tab.get_by_label("Centre and scale").focus()
    for digit in range(10):
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        tab.says(f"It reads a {digit}.")


def test_without_centring_a_small_digit_in_a_corner_is_read_wrong(tab):
    draw(tab, clear(tab), DIGITS[4], scale=0.3, left=0.7)
    tab.says("It reads a 4.")
    tab.get_by_label("Centre and scale").uncheck()
    expect(tab.locator("output")).not_to_have_text("It reads a 4.")
    draw(tab, clear(tab), [[(0.5, 0.5)]])  # a dot
    expect(tab.locator("output")).to_contain_text("It reads a ")


@pytest.mark.parametrize("tab", [PHONE], indirect=True)
def test_a_second_finger_and_an_interrupted_touch(tab):
    box, devtools = clear(tab).bounding_box(), tab.context.new_cdp_session(tab)
    strokes = [("Start", 40, 40), ("Start", 40, 40, 240), ("Move", 240, 40, 240), ("Cancel", 0)]  # x, and y of each
    for event, x, *fingers in [*strokes, ("Start", 40, 140), ("Move", 240, 140), ("End", 0)]:
        points = [{"x": box["x"] + x, "y": box["y"] + y, "id": y} for y in fingers]
        devtools.send("Input.dispatchTouchEvent", {"type": f"touch{event}", "touchPoints": points})
    ink = "(pad) => [40, 90, 140, 190, 240].map((y) => pad.getContext('2d').getImageData(140, y, 1, 1).data[3])"
    assert tab.locator(".pad").evaluate(ink) == [255, 0, 255, 0, 0]
