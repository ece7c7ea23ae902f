"""Digits as strokes, and how a reader draws them on the pad: with a mouse, a finger (on a phone) or a pen."""

from math import cos, radians, sin


def arc(x, y, width, height, start, end):
    """Return the points of a part of an ellipse, by its centre, half its axes and two angles in degrees."""
    angles = [radians(start + (end - start) * i / 12) for i in range(13)]
    return [(x + width * cos(angle), y + height * sin(angle)) for angle in angles]


PHONE = dict(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
DIGITS = [  # each a list of strokes, and a stroke a list of points (x, y), 0 to 1, from the top left
    [arc(0.5, 0.5, 0.22, 0.35, -90, 270)],
    [[(0.5, 0.15), (0.5, 0.85)]],
    [arc(0.5, 0.35, 0.2, 0.2, -180, 40) + [(0.3, 0.85), (0.72, 0.85)]],
    [arc(0.47, 0.33, 0.18, 0.17, -160, 90) + arc(0.47, 0.67, 0.21, 0.18, -90, 160)],
    [[(0.42, 0.15), (0.28, 0.55), (0.75, 0.55)], [(0.62, 0.2), (0.62, 0.88)]],
    [[(0.7, 0.15), (0.38, 0.15), (0.35, 0.45), *arc(0.48, 0.63, 0.2, 0.2, -130, 150)]],
    [[(0.62, 0.14), (0.42, 0.4), *arc(0.5, 0.66, 0.18, 0.18, -170, 190)]],
    [[(0.28, 0.18), (0.72, 0.18), (0.45, 0.86)]],
    [arc(0.5, 0.32, 0.16, 0.16, 90, -270) + arc(0.5, 0.68, 0.19, 0.19, -90, 270)],
    [[*arc(0.5, 0.35, 0.17, 0.17, 0, 360), (0.66, 0.45), (0.6, 0.87)]],
]


def draw(tab, pad, strokes, kind="mouse", scale=1.0, left=0.0, top=0.0):
    """Draw strokes on a pad, a locator in a tab, as "mouse", "pen" or "touch"; with scale, small, and at a place."""
    pad.scroll_into_view_if_needed()
    box, devtools = pad.bounding_box(), tab.context.new_cdp_session(tab)
    for stroke in strokes:
        for event, (x, y) in [("Start", stroke[0]), *(("Move", point) for point in stroke[1:]), ("End", stroke[-1])]:
            at = {"x": box["x"] + box["width"] * (left + scale * x), "y": box["y"] + box["height"] * (top + scale * y)}
            if kind == "touch":
                touch = {"type": f"touch{event}", "touchPoints": [at] if event != "End" else []}
                devtools.send("Input.dispatchTouchEvent", touch)
            else:
                name = {"Start": "mousePressed", "Move": "mouseMoved", "End": "mouseReleased"}[event]
                mouse = {"type": name, "button": "left", "buttons": 1, "pointerType": kind}
                devtools.send("Input.dispatchMouseEvent", at | mouse)
