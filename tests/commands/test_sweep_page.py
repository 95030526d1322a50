"""sweep.html in a real browser: hover, click, keyboard, dark mode, a phone."""

import json

import pytest

from slimming.commands.sweep import report

pytestmark = pytest.mark.slow  # a browser


def point(allocation, ratio, repaired, **more):
    share = 1 - ratio
    return {
        "id": f"{allocation} {ratio}", "allocation": allocation, "ratio": ratio, "params": share,
        "flops": share, "latency": share, "ms": 10 * share, "parameters": int(1e6 * share),
        "FLOPs": int(1e7 * share), "pruned": repaired / 2, "repaired": repaired,
        "layers": [["conv1", 16, int(16 * share)], ["</script><b>", 8, 8]],
        "command": f"python resprune.py --percent {ratio} --allocation {allocation}", **more,
    }  # fmt: skip


FACTS = {
    "title": "resnet-20 </script><script>window.broken = true</script>",
    "checkpoint": "logs/model_best.pth.tar",
    "dense": {"parameters": 10**6, "FLOPs": 10**7, "held back": 0.9},
    "points": [
        *(point("global", r, a) for r, a in ((0.2, 0.88), (0.5, 0.7), (0.8, 0.2))),
        *(point("lamp", r, a) for r, a in ((0.25, 0.89), (0.55, 0.75), (0.85, 0.3))),
        *(point(f"random-{i}", r, a) for i, r, a in ((1, 0.3, 0.6), (2, 0.6, 0.8))),
    ],
    "chosen": {"id": "lamp 0.55", "exact": False, "test": {"dense": {"prec1": 0.91}}},
    "cost": "flops",
    "front": ["global 0.5", "lamp 0.55"],
    "why": "the knee of the front, beyond which accuracy falls faster than cost",
}


@pytest.fixture
def show(browser, tmp_path):
    """Open the page of FACTS; after the test, it must have had no error and asked for no file."""
    path, trouble, pages = tmp_path / "sweep.html", [], []
    path.write_text(report.page(FACTS), encoding="utf-8")

    def opened(**settings):
        page = browser.new_page(**settings)
        pages.append(page)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: r.url != path.as_uri() and trouble.append(r.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for page in pages:
        page.close()
    assert not trouble


def dot(page, name):
    return page.locator(f'[data-id="{name}"]')


def test_hovering_shows_figures_and_a_click_shows_layers_and_copies_the_command(show):
    page = show()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    assert page.locator(".point").count() == 8 and not page.evaluate("window.broken")
    assert page.locator("h1").inner_text() == FACTS["title"]
    assert "lamp, 55.0 % of the channels pruned (the knee" in page.locator("#details").inner_text()
    assert "91.00 %" in page.locator("#details").inner_text()
    dot(page, "global 0.5").hover()
    tip = page.locator("#tip").inner_text()
    assert "global, 50.0 % pruned" in tip and "FLOPs 50.0 %" in tip and "70.0 %" in tip
    dot(page, "global 0.5").click()
    shown = page.locator("#details").inner_text()
    assert "global, 50.0 % of the channels" in shown and "91.00 %" not in shown
    rows = page.locator("#details tbody tr").all_inner_texts()
    assert [row.split() for row in rows] == [["conv1", "16", "8"], ["</script><b>", "8", "8"]]
    page.locator("#copy").click()
    page.get_by_text("Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == FACTS["points"][1]["command"] == page.locator("#command").inner_text()


def test_the_keyboard_moves_along_curves_and_between_them(show):
    page = show()
    page.keyboard.press("Tab")
    while not page.evaluate("document.activeElement.classList.contains('point')"):
        page.keyboard.press("Tab")

    def focused():
        return page.evaluate("document.activeElement.dataset.id")

    assert focused() == "lamp 0.55"  # the chosen one
    for key, name in (
        ("ArrowRight", "lamp 0.25"), ("ArrowRight", "lamp 0.25"), ("ArrowLeft", "lamp 0.55"),
        ("Home", "lamp 0.85"), ("ArrowDown", "random-2 0.6"), ("ArrowDown", "global 0.5"),
        ("ArrowUp", "random-2 0.6"), ("End", "random-1 0.3"),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert focused() == name, key
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Enter")
    assert "random-1, 30.0 %" in page.locator("#details h2").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "copy"


def test_curves_can_be_hidden_and_the_axis_changed(show):
    page = show()
    place = dot(page, "global 0.2").get_attribute("cx")
    page.select_option("#axis", "ratio")
    assert dot(page, "global 0.2").get_attribute("cx") != place
    page.get_by_role("checkbox", name="global").uncheck()
    assert dot(page, "global 0.2").count() == 0 and page.locator(".point").count() == 5
    dotted = page.locator(".curve.pruned").count()
    page.get_by_role("checkbox", name="as pruned").uncheck()
    assert dotted == 2 and page.locator(".curve.pruned").count() == 0


def test_dark_mode_is_readable_and_a_phone_needs_no_sideways_scrolling(show):
    colors = []
    for scheme in ("light", "dark"):
        page = show(color_scheme=scheme, viewport={"width": 360, "height": 740})
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
        text = "getComputedStyle(document.body).color"
        ground = "getComputedStyle(document.body).backgroundColor"
        lights = [sum(json.loads(f"[{page.evaluate(e)[4:-1]}]")) / 765 for e in (text, ground)]
        assert abs(lights[0] - lights[1]) > 0.6
        colors.append(lights[1])
        dot(page, "lamp 0.25").click()
        assert "lamp, 25.0 %" in page.locator("#details h2").inner_text()
    assert colors[0] > 0.8 > 0.3 > colors[1]
