"""The web page in a real headless Chromium: open, click, see pixels change, undo, reload, export."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samed3d.apps
from samed3d.geometry import Grid
from samed3d.volume import read_volume, write_volume

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VIEWER = Path(samed3d.apps.__file__).with_name("viewer") / "vendor" / "niivue.js"
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
WAIT_MS = 90_000


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bright ball in noise, on a grid that is flipped and permuted, so that the page must mind the axes."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:40, :48, :56]
    ball = (z - 20) ** 2 + (y - 24) ** 2 + (x - 28) ** 2 < 12**2
    array = (ball * 300 + rng.normal(100, 15, ball.shape)).astype(np.float32)
    grid = Grid((40, 48, 56), (1.0, 1.0, 1.0), (10.0, -20.0, 5.0), (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
    path = tmp_path_factory.mktemp("image") / "ball.nii.gz"
    write_volume(path, array, grid)
    return path


class Running:
    """``samed3d app`` as a process of its own; ``SAMED3D_PROGRAM`` names another installation's ``samed3d``."""

    def __init__(self, volume: Path, sessions: Path) -> None:
        self.port = free_port()
        program = os.environ.get("SAMED3D_PROGRAM", f"{sys.executable} -m samed3d").split()
        command = [*program, *f"app --no-browser --port {self.port} --sessions".split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, str(sessions), str(volume)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if " is open at " in line:
                self.page = line.rsplit(" ", 1)[1].strip()
                return
        raise AssertionError("the app ended before its volume was open")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@pytest.fixture
def running(volume: Path, tmp_path: Path) -> Iterator[Running]:
    app = Running(volume, tmp_path / "sessions")
    yield app
    app.stop()


@pytest.fixture
def page(running: Running) -> Iterator[object]:
    if CHROMIUM is None or not VIEWER.is_file():
        pytest.skip("needs chromium on the PATH and the viewer (make viewer)")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        tab = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True).new_page()
        tab.errors = []
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        open_page(tab, running.page)
        yield tab
        assert tab.errors == []
        browser.close()


def open_page(tab, address: str) -> None:
    tab.goto(address)
    tab.wait_for_selector("body[data-ready=yes]", timeout=WAIT_MS)
    tab.wait_for_function("!document.getElementById('export').disabled", timeout=WAIT_MS)


def picture_of(tab) -> np.ndarray:
    """What the stage shows, (height, width, 3)."""
    tab.wait_for_timeout(600)
    return np.asarray(Image.open(io.BytesIO(tab.locator("#stage").screenshot())).convert("RGB")).astype(int)


def orange_pixels(tab) -> int:
    """How many pixels of the picture have the hue of the first object."""
    red, green, blue = np.moveaxis(picture_of(tab), -1, 0)
    return int(((red > blue + 40) & (red > green + 15) & (green > blue)).sum())


def wait_prompts(tab, count: int) -> None:
    tab.wait_for_function(f"document.querySelectorAll('#prompts li').length === {count}", timeout=WAIT_MS)
    tab.wait_for_function("document.getElementById('busy').hidden", timeout=WAIT_MS)


def pixel_of(tab, ijk: list[int] | None = None) -> tuple[float, float]:
    """Where a voxel, or the crosshair, appears in the axial plane."""
    at = tab.evaluate(
        "(ijk) => { const { stage } = window.samed3d; return stage.project(ijk ?? stage.here())[0]; }", ijk
    )
    view = tab.locator("#view").bounding_box()
    return view["x"] + at["x"], view["y"] + at["y"]


def click_ball(tab, button: str = "left", dx: int = 0) -> None:
    """Click the middle of the axial plane, which is where the crosshair starts."""
    x, y = pixel_of(tab)
    tab.mouse.click(x + dx, y, button=button)


def test_a_click_shows_a_mask_and_undo_takes_it_away(page):
    assert orange_pixels(page) < 50
    click_ball(page)
    wait_prompts(page, 1)
    seen = orange_pixels(page)
    assert seen > 1000
    page.keyboard.press("z")
    wait_prompts(page, 0)
    assert orange_pixels(page) < 50
    page.keyboard.press("Shift+Z")
    wait_prompts(page, 1)
    assert abs(orange_pixels(page) - seen) < 0.02 * seen


def test_the_clicked_voxel_is_the_one_under_the_pointer_and_the_export_is_on_the_image_grid(page, volume, tmp_path):
    click_ball(page)
    wait_prompts(page, 1)
    assert page.inner_text("#prompts li .name") == "click 28, 24, 20"
    page.keyboard.press("x")
    with page.expect_download(timeout=WAIT_MS) as download:
        page.click("#do-export")
    target = tmp_path / "seen.nii.gz"
    download.value.save_as(target)
    mask, image = read_volume(target), read_volume(volume)
    assert mask.grid == image.grid
    assert mask.array[20, 24, 28] == 1
    truth = image.array > 250
    assert 2 * (truth & (mask.array > 0)).sum() / (truth.sum() + (mask.array > 0).sum()) > 0.5


def test_right_click_and_the_switch_remove_and_prompts_can_be_flipped_and_deleted(page):
    click_ball(page)
    wait_prompts(page, 1)
    click_ball(page, button="right", dx=60)
    wait_prompts(page, 2)
    assert page.locator("#prompts .minus").count() == 1
    page.keyboard.press("t")
    click_ball(page, dx=-60)
    wait_prompts(page, 3)
    assert page.locator("#prompts .minus").count() == 2
    page.locator("#prompts li").nth(1).get_by_title("Turn to the other sign").click()
    page.wait_for_function("document.querySelectorAll('#prompts .minus').length === 1", timeout=WAIT_MS)
    page.locator("#prompts li").nth(2).get_by_title("Delete").click()
    wait_prompts(page, 2)


def test_a_double_click_is_one_prompt_and_a_new_object_starts_positive(page):
    x, y = pixel_of(page)
    page.mouse.dblclick(x, y)
    wait_prompts(page, 1)
    page.wait_for_timeout(600)
    wait_prompts(page, 1)
    page.keyboard.press("t")
    assert page.inner_text("#sign") == "− removes"
    page.keyboard.press("n")
    page.wait_for_function("document.querySelectorAll('#objects li').length === 2", timeout=WAIT_MS)
    page.wait_for_function("document.getElementById('sign').textContent === '+ adds'", timeout=WAIT_MS)
    click_ball(page)
    wait_prompts(page, 1)
    assert page.locator("#prompts .plus").count() == 1


def test_a_negative_box_removes_what_is_inside_it(page):
    click_ball(page)
    wait_prompts(page, 1)
    x, y = pixel_of(page)
    page.keyboard.press("b")
    page.mouse.move(x - 20, y - 20)
    page.mouse.down(button="right")
    page.mouse.move(x + 20, y + 20, steps=4)
    page.mouse.up(button="right")
    wait_prompts(page, 2)
    lasso = page.evaluate("() => window.samed3d.state.objects[0].prompts[1]")
    assert lasso["type"] == "lasso" and lasso["positive"] is False and len(lasso["outline"]) == 4
    mask = page.evaluate("() => { const m = window.samed3d.stage.masks; return [...m.masks.get(1)]; }")
    bits = np.unpackbits(np.array(mask, np.uint8), bitorder="little")[: 56 * 48 * 40].reshape(40, 48, 56)
    outline = np.array(lasso["outline"])
    low, high = np.ceil(outline.min(0)).astype(int), np.floor(outline.max(0)).astype(int)
    inside = bits[low[2] : high[2] + 1, low[1] : high[1] + 1, low[0] : high[0] + 1]
    assert inside.size > 4 and not inside.any() and bits.any()


def test_the_session_comes_back_after_a_reload_and_after_a_restart(page, running, volume, tmp_path):
    click_ball(page)
    wait_prompts(page, 1)
    seen = orange_pixels(page)
    page.reload()
    open_page(page, page.url)
    wait_prompts(page, 1)
    assert abs(orange_pixels(page) - seen) < 0.02 * seen
    session = page.url.split("#")[1]
    running.stop()
    again = Running(volume, tmp_path / "sessions")
    try:
        open_page(page, f"http://127.0.0.1:{again.port}/app/#{session}")
        wait_prompts(page, 1)
        assert abs(orange_pixels(page) - seen) < 0.02 * seen
    finally:
        again.stop()


def test_objects_strokes_boxes_and_a_second_tab(page):
    x, y = pixel_of(page)

    def drag(key: str, *path: tuple[int, int]) -> None:
        page.keyboard.press(key)
        page.mouse.move(x + path[0][0], y + path[0][1])
        page.mouse.down()
        for dx, dy in path[1:]:
            page.mouse.move(x + dx, y + dy, steps=4)
        page.mouse.up()

    drag("b", (-60, -60), (60, 60))
    wait_prompts(page, 1)
    drag("e", (-5, -70), (5, -60))
    wait_prompts(page, 2)
    page.keyboard.press("n")
    page.wait_for_function("document.querySelectorAll('#objects li').length === 2", timeout=WAIT_MS)
    drag("s", (-10, 0), (10, 5))
    wait_prompts(page, 1)
    drag("l", (-30, -30), (30, -30), (30, 30), (-30, 30))
    wait_prompts(page, 2)
    other = page.context.new_page()
    open_page(other, page.url)
    other.keyboard.press("n")
    other.wait_for_function("document.querySelectorAll('#objects li').length === 3", timeout=WAIT_MS)
    page.keyboard.press("n")  # this tab has not seen it: refused with a line, then shown what is true
    page.wait_for_function("!document.getElementById('notice').hidden", timeout=WAIT_MS)
    page.wait_for_function("document.querySelectorAll('#objects li').length === 3", timeout=WAIT_MS)
    other.close()


def test_the_page_needs_no_other_site(running):
    with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/app/") as answer:
        text = answer.read().decode()
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


@pytest.fixture(scope="module")
def dark(volume: Path) -> Path:
    """Another image, of another size, in the folder of ``volume``."""
    rng = np.random.default_rng(1)
    path = volume.with_name("dark.nii.gz")
    write_volume(path, rng.normal(-50, 5, (30, 32, 34)).astype(np.float32), Grid((30, 32, 34), (1.0, 1.0, 1.0)))
    return path


def open_file(page, path: Path) -> None:
    page.set_input_files("#file", str(path))
    page.wait_for_function(f"document.getElementById('volume-name').textContent === '{path.name}'", timeout=WAIT_MS)
    page.wait_for_function("window.samed3d.state.session !== null", timeout=WAIT_MS)


HEAT = "() => [window.samed3d.stage.nv.volumes.length, Boolean(window.samed3d.stage.heat)]"


def test_a_heat_map_never_outlives_its_switch_or_its_image(page, dark):
    page.evaluate("() => document.getElementById('opacity').value = 0")
    page.evaluate("() => document.getElementById('opacity').dispatchEvent(new Event('input'))")
    click_ball(page)
    wait_prompts(page, 1)
    nothing = orange_pixels(page)
    page.keyboard.press("h")
    page.wait_for_function("window.samed3d.stage.heat !== null", timeout=WAIT_MS)
    assert orange_pixels(page) > nothing + 500
    page.keyboard.press("h")
    page.wait_for_function("window.samed3d.stage.heat === null", timeout=WAIT_MS)
    assert orange_pixels(page) <= nothing + 20  # the planes and the 3D view are as before
    for _ in range(5):  # five requests in flight; the last switch is off
        page.keyboard.press("h")
    page.keyboard.press("h")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(1500)
    assert page.evaluate(HEAT) == [1, False] and orange_pixels(page) <= nothing + 20
    page.keyboard.press("h")
    page.wait_for_function("window.samed3d.stage.heat !== null", timeout=WAIT_MS)
    open_file(page, dark)
    page.wait_for_timeout(1000)
    assert page.evaluate(HEAT) == [1, False] and orange_pixels(page) < 50


def test_an_answer_that_comes_after_another_image_was_opened_is_not_shown(page, dark):
    click_ball(page)
    wait_prompts(page, 1)
    page.evaluate(
        """() => { const { api } = window.samed3d, real = api.heat.bind(api);
        api.heat = async (id) => { const bytes = await real(id); await new Promise((go) => (window.go = go)); return bytes; }; }"""
    )
    page.keyboard.press("h")
    page.wait_for_function("window.go !== undefined", timeout=WAIT_MS)
    open_file(page, dark)
    page.evaluate("() => window.go()")
    page.wait_for_timeout(1500)
    assert page.evaluate(HEAT) == [1, False] and orange_pixels(page) < 50


def test_an_object_is_renamed_by_double_click_and_f2_and_its_letters_run_no_shortcuts(page):
    click_ball(page)
    wait_prompts(page, 1)
    page.keyboard.press("n")
    page.wait_for_function("document.querySelectorAll('#objects li').length === 2", timeout=WAIT_MS)
    names = "[...document.querySelectorAll('#objects .name')].map((n) => n.textContent).join()"
    page.locator("#objects li span.name").first.dblclick()
    page.keyboard.type("nothz")  # each letter is a shortcut
    page.keyboard.press("Enter")
    page.wait_for_function(f"{names} === 'nothz,object 2'", timeout=WAIT_MS)
    assert page.locator("#objects li").count() == 2 and not page.is_checked("#heat")
    page.keyboard.press("2")
    page.keyboard.press("F2")
    page.keyboard.type("gone")
    page.keyboard.press("Escape")
    page.keyboard.press("F2")
    page.keyboard.type("spleen")
    page.keyboard.press("Enter")
    page.wait_for_function(f"{names} === 'nothz,spleen'", timeout=WAIT_MS)


def test_the_window_menu_shows_what_is_set(page, dark):
    def shown() -> str:
        return page.evaluate("() => document.getElementById('window').selectedOptions[0].textContent")

    assert shown() == "automatic"
    page.select_option("#window", "-160,240")
    assert shown() == "CT soft tissue"
    page.click("[data-tool=navigate]")
    x, y = pixel_of(page)
    page.mouse.move(x - 40, y - 40)
    page.mouse.down(button="right")
    page.mouse.move(x + 40, y + 40, steps=4)
    page.mouse.up(button="right")
    page.wait_for_function("document.getElementById('window').selectedIndex === 5", timeout=WAIT_MS)
    low, high = page.evaluate("() => { const v = window.samed3d.stage.nv.volumes[0]; return [v.cal_min, v.cal_max]; }")
    assert [float(part) for part in shown().split(" to ")] == pytest.approx([low, high], rel=1e-3)
    open_file(page, dark)
    assert shown() == "automatic"


def test_a_good_open_takes_an_old_error_away(page, dark, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"not an image")
    page.set_input_files("#file", str(bad))
    page.wait_for_function("!document.getElementById('notice').hidden", timeout=WAIT_MS)
    open_file(page, dark)
    assert page.locator("#notice").is_hidden()


def test_outlines_are_wider_than_a_hairline(page):
    click_ball(page)
    wait_prompts(page, 1)
    page.keyboard.press("k")
    picture = picture_of(page)
    edge = (picture[..., 0] > picture[..., 2] + 90) & (picture[..., 0] > 150)
    height, width = edge.shape
    runs = [len(run) for row in edge[: height // 2] for run in "".join("#" if on else " " for on in row).split()]
    assert len(runs) > 50 and np.median(runs) >= 3
