"""classify.html in a real browser: PyTorch's answers, wrong files, keyboard, dark mode, a phone."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from base64 import b64encode

import pytest
from conftest import KINDS, agree
from warm import ROOT

pytestmark = pytest.mark.slow  # a browser
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def site():
    """The address of the suite's folder, served as ``python -m http.server`` does."""
    if not shutil.which("npm") or not shutil.which("make"):
        pytest.skip("no npm: install Node.js")
    env = {**os.environ, "npm_config_fetch_retries": "0"}
    made = subprocess.run(
        ["make", "web"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"make web: {made.stderr.strip()[-200:]}")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            """Nothing."""

    handler = functools.partial(Quiet, directory=ROOT)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def show(browser, site):
    """Open the page; after the test, it must have had no error and sent nothing anywhere."""
    trouble, pages = [], []

    def known(request):
        return request.method == "GET" and request.url.startswith((site, "blob:", "data:"))

    def opened(**settings):
        page = browser.new_page(**settings)
        pages.append(page)
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda r: known(r) or trouble.append(r.url))
        page.goto(f"{site}examples/classify.html")
        page.locator("#blocked").wait_for(state="detached")
        return page

    yield opened
    for page in pages:
        page.close()
    assert not trouble


def told(page):
    """(class, probability) of each picture on the page."""
    rows = page.locator("#results article").all()
    return [
        (row.locator(".name").first.inner_text(), row.locator(".share").first.inner_text())
        for row in rows
    ]


def status(page, text):
    page.locator("#status").get_by_text(text).wait_for()


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_gives_the_answers_of_pytorch(show, digits_onnx, pictures, answers, kind):
    page = show()
    page.set_input_files("#network", digits_onnx(kind))
    status(page, "Now choose pictures.")
    assert kind in page.locator("#facts").inner_text()
    page.set_input_files("#pictures", pictures)
    status(page, f"{len(pictures)} pictures classified.")
    assert agree(told(page), answers)
    first = page.locator("#results article").first
    assert first.locator("h2").inner_text() == pictures[0].name
    assert re.search(r"[0-9.]+ ms in the network", first.inner_text())
    width, most = (first.locator(s).first.bounding_box()["width"] for s in (".bar b", ".bar"))
    assert width / most == pytest.approx(answers[0][1], abs=0.02)
    assert first.locator("img").evaluate("image => image.naturalWidth") == 32


def test_pictures_get_the_border_of_mnist(show, bordered, pictures):
    path, expected = bordered
    page = show()
    page.set_input_files("#network", path)
    page.set_input_files("#pictures", pictures)
    status(page, f"{len(pictures)} pictures classified.")
    assert agree(told(page), expected)


DROP = """files => {
  const dropped = new DataTransfer();
  for (const [name, bytes] of files) {
    dropped.items.add(new File([Uint8Array.from(atob(bytes), c => c.charCodeAt())], name));
  }
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
}"""


def test_network_and_pictures_dropped_together_are_told_apart(show, digits_onnx, pictures, answers):
    page = show()
    files = [*pictures[:2], digits_onnx()]
    page.evaluate(DROP, [[path.name, b64encode(path.read_bytes()).decode()] for path in files])
    status(page, "2 pictures classified.")
    assert agree(told(page), answers[:2])
    page.set_input_files("#network", digits_onnx("uint8 NHWC", 1))  # another: the same pictures
    page.locator("#facts").get_by_text("uint8 NHWC").first.wait_for()
    status(page, "2 pictures classified.")
    assert agree(told(page), answers[:2])
    page.get_by_role("button", name="Remove the pictures").click()
    assert page.locator("#results article").count() == 0


def test_wrong_files_are_told_and_what_was_there_stays(
    show, digits_onnx, pictures, answers, tmp_path
):
    onnx = pytest.importorskip("onnx")
    bare = onnx.load(digits_onnx())
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    (tmp_path / "text.onnx").write_text("no network\n" * 9)
    (tmp_path / "half.onnx").write_bytes(digits_onnx().read_bytes()[:5000])
    (tmp_path / "<b>text.png").write_text("no picture")
    page = show()
    page.set_input_files("#network", digits_onnx())
    for name, says in (
        ("bare.onnx", "lacks the metadata classes, image_size, input, mean, std"),
        ("text.onnx", "is not an ONNX file"),
        ("half.onnx", "is not an ONNX file, or it is damaged"),
    ):
        page.set_input_files("#network", tmp_path / name)
        page.get_by_role("alert").get_by_text(f"{name} {says}").wait_for()
    page.set_input_files("#pictures", [tmp_path / "<b>text.png", pictures[0]])
    page.get_by_role("alert").get_by_text("<b>text.png is not a picture").wait_for()
    status(page, "1 picture classified.")
    assert agree(told(page), answers[:1])
    assert page.locator("#errors p").count() == 1  # of the last files alone


def test_without_onnx_runtime_the_page_says_how_to_get_it(show, digits_onnx):
    page = show()
    page.route("**/vendor/**", lambda route: route.abort())
    page.set_input_files("#network", digits_onnx())
    page.get_by_role("alert").get_by_text("run `make web`").wait_for()


def test_the_page_works_by_keyboard(show, digits_onnx, pictures):
    page = show()
    page.on("filechooser", lambda chooser: None)  # asked for before any key is pressed
    for name, files, says in (
        ("network", digits_onnx(), "Now choose pictures."),
        ("pictures", pictures[:1], "1 picture classified."),
    ):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Space")
        chooser.value.set_files(files)
        status(page, says)  # a page that computes for 5 s forgets that a key was pressed
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#results article").count() == 0
    assert page.evaluate("document.activeElement.id") == "pictures"


def test_dark_mode_is_readable_and_a_phone_needs_no_sideways_scrolling(show, digits_onnx, pictures):
    grounds = []
    for scheme in ("light", "dark"):
        page = show(color_scheme=scheme, viewport={"width": 360, "height": 740})
        page.set_input_files("#network", digits_onnx())
        page.set_input_files("#pictures", pictures)
        status(page, f"{len(pictures)} pictures classified.")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        colors = [f"getComputedStyle(document.body).{k}" for k in ("color", "backgroundColor")]
        text, ground = (sum(json.loads(f"[{page.evaluate(c)[4:-1]}]")) / 765 for c in colors)
        assert abs(text - ground) > 0.6
        grounds.append(ground)
    assert grounds[0] > 0.8 > 0.3 > grounds[1]


def test_opened_as_a_file_the_page_says_what_to_do(browser):
    page = browser.new_page()
    page.goto((EXAMPLES / "classify.html").as_uri())
    page.locator("#blocked").wait_for(state="visible")
    assert "python -m http.server" in page.locator("#blocked").inner_text()
    page.close()
