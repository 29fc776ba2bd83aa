"""The web page: cleaning masks, and what it tells of an object and a voxel."""

from __future__ import annotations

import pytest

from samed3d.volume import read_volume
from tests.test_viewer_browser import (  # noqa: F401
    WAIT_MS,
    click_ball,
    orange_pixels,
    page,
    pixel_of,
    running,
    volume,
    wait_prompts,
)

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_a_mask_is_cleaned_by_the_menu_and_the_keys_are_shortcuts_again(page):  # noqa: F811
    assert page.locator("#clean").is_disabled()
    click_ball(page)
    wait_prompts(page, 1)
    voxels, shown = "window.samed3d.state.objects[0].voxels", orange_pixels(page)
    before = page.evaluate(voxels)
    page.select_option("#clean", label="grow by 1 mm")
    page.wait_for_function(f"{voxels} > {before}", timeout=WAIT_MS)
    assert orange_pixels(page) > shown and page.input_value("#clean") == ""
    page.keyboard.press("z")
    page.wait_for_function(f"{voxels} === {before}", timeout=WAIT_MS)
    assert orange_pixels(page) == pytest.approx(shown, rel=0.05)


def test_the_list_shows_millilitres_and_the_pointer_shows_value_and_position(page, volume):  # noqa: F811
    click_ball(page)
    wait_prompts(page, 1)
    voxels = page.evaluate("() => window.samed3d.state.objects[0].voxels")
    assert page.inner_text("#objects .size") == f"{voxels / 1000:.1f} mL"  # voxels of 1 mm
    page.mouse.move(*pixel_of(page, [31, 24, 17]))  # in the first plane, across which j is 24
    image = read_volume(volume)
    position = ", ".join(f"{v:.1f}" for v in image.grid.ijk_to_ras_mm((31, 24, 17)))
    text = page.inner_text("#where")
    assert "i 31 j 24 k 17" in " ".join(text.split()) and f"RAS {position} mm" in text
    assert float(text.split("value")[1].split()[0]) == pytest.approx(float(image.array[17, 24, 31]), abs=0.01)
    page.keyboard.press("n")
    page.wait_for_function("document.querySelectorAll('#objects .size')[1]?.textContent === 'empty'", timeout=WAIT_MS)
