"""The dock on a ``ViewerModel`` without a window, and in a real viewer, with real mouse events, where there is a
display."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from samed3d.inference.session import Session
from samed3d.prompts import Box, Lasso, Mask, Scribble
from samed3d.volume import read_volume
from tests.clicked_model import ClickedModel
from tests.server_tools import BALL_IJK, write_ball

pytestmark = [pytest.mark.napari, pytest.mark.timeout(300)]
SESSION = "samed3d.apps.napari_plugin.widget"


@pytest.fixture(autouse=True)
def _napari_is_here() -> None:
    pytest.importorskip("napari", reason="napari is not installed: pip install 'samed3d[napari]' and a Qt binding")
    pytest.importorskip("qtpy.QtWidgets", reason="no Qt binding is installed: pip install PySide6")


@pytest.fixture
def application(_napari_is_here: None) -> Any:
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("win32", "darwin")):
        os.environ["QT_QPA_PLATFORM"] = "offscreen"
    from napari.qt import get_qapp

    return get_qapp()


def until(application: Any, condition: Callable[[], bool], seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        application.processEvents()
        time.sleep(0.01)
        assert time.monotonic() < ends, "it did not happen"
    application.processEvents()


@pytest.fixture
def dock(application: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The widget on a viewer model, with a tiny model behind it and the ball opened from its file."""
    from napari.components import ViewerModel

    from samed3d.apps.napari_plugin.widget import PromptWidget

    monkeypatch.setattr(f"{SESSION}.open_local", lambda volume, model: Session(volume, ClickedModel()))
    write_ball(tmp_path / "ball.nii.gz")
    widget = PromptWidget(ViewerModel())
    widget.open_file(str(tmp_path / "ball.nii.gz"))
    until(application, lambda: widget.controller is not None and widget.worker.waiting == 0)
    yield widget
    widget.close()


def test_the_dock_opens_clicks_undoes_and_saves(application, dock, tmp_path):
    def idle() -> None:
        until(application, lambda: dock.worker.waiting == 0)

    dock.layers.points.add([BALL_IJK[::-1]])
    dock.layers.points.add([(16.0, 8.0, 20.0)])  # before the first is answered
    idle()
    assert len(dock.controller.session.objects()[0].prompts) == 2 and len(dock.layers.points.data) == 2
    both = dock.layers.masks.data.copy()
    assert both.any() and "voxels" in dock._status.text()
    dock._undo.click()
    idle()
    assert len(dock.layers.points.data) == 1 and not np.array_equal(dock.layers.masks.data, both)
    dock._redo.click()
    idle()
    np.testing.assert_array_equal(dock.layers.masks.data, both)
    dock.save(str(tmp_path / "mask"))
    idle()
    np.testing.assert_array_equal(read_volume(tmp_path / "mask.nii.gz").array, both)
    assert "Written" in dock._status.text()
    dock._suggest.click()
    idle()
    assert "Least certain" in dock._status.text()


def test_the_dock_lists_objects_and_changes_them(application, dock):
    def idle() -> None:
        until(application, lambda: dock.worker.waiting == 0)

    dock.layers.points.add([BALL_IJK[::-1]])
    idle()
    dock._new()
    idle()
    assert dock._objects.topLevelItemCount() == 2 and dock._objects.chosen == 2 and dock.layers.object_id == 2
    dock._objects.topLevelItem(1).setText(2, "spleen")
    idle()
    assert [o.name for o in dock.controller.session.objects()] == ["object 1", "spleen"]
    dock._objects.setCurrentItem(dock._objects.topLevelItem(0))
    assert dock.layers.object_id == 1
    dock._remove()
    idle()
    assert [o.id for o in dock.controller.session.objects()] == [2]


def test_removing_a_layer_closes_the_session(application, dock):
    dock._viewer.layers.remove(dock.layers.points)
    until(application, lambda: dock.worker.waiting == 0)
    assert dock.controller is None and [layer.name for layer in dock._viewer.layers] == ["ball.nii.gz"]
    dock.start_on(dock._viewer.layers[0])
    until(application, lambda: dock.controller is not None and dock.worker.waiting == 0)


def test_the_dock_says_what_cannot_be_opened(application, dock, tmp_path):
    dock.open_file(str(tmp_path / "missing.nii.gz"))
    until(application, lambda: dock.worker.waiting == 0)
    assert "does not exist" in dock._status.text()


# A real viewer


@pytest.fixture
def viewer(application: Any) -> Iterator[Any]:
    if os.environ.get("QT_QPA_PLATFORM") == "offscreen":
        pytest.skip("a real viewer needs a display: run under xvfb-run")
    import napari

    shown = napari.Viewer(show=True)
    yield shown
    shown.close()


@pytest.fixture
def window(application: Any, viewer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The dock as napari itself adds it, with the ball open in the slice of its middle; and the canvas."""
    monkeypatch.setattr(f"{SESSION}.open_local", lambda volume, model: Session(volume, ClickedModel()))
    write_ball(tmp_path / "ball.nii.gz")
    _, dock = viewer.window.add_plugin_dock_widget("samed3d", "Segment from clicks")
    dock.open_file(str(tmp_path / "ball.nii.gz"))
    until(application, lambda: dock.controller is not None and dock.worker.waiting == 0)
    viewer.dims.set_current_step(0, BALL_IJK[2])
    viewer.reset_view()
    canvas = viewer.window._qt_viewer.canvas.native
    application.processEvents()

    def objects() -> list[Any]:
        until(application, lambda: dock.worker.waiting == 0)
        return dock.controller.session.objects()

    return SimpleNamespace(dock=dock, canvas=canvas, objects=objects, idle=objects)


def test_real_clicks_in_a_real_viewer(application, window):
    """Qt's own mouse events on the canvas: left click adds, Ctrl+click is off the object, Ctrl+Z takes it back."""
    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest

    dock, canvas = window.dock, window.canvas
    middle = QPoint(canvas.width() // 2, canvas.height() // 2)
    QTest.mouseClick(canvas, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier, middle)
    until(application, lambda: len(dock.layers.points.data) == 1)
    (point,) = window.objects()[0].prompts
    np.testing.assert_allclose(
        point.at, (15.5, 13.5, 11), atol=0.6
    )  # the middle of the image, in the slice that is shown
    QTest.mouseClick(canvas, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.ControlModifier, middle + QPoint(80, 0))
    until(application, lambda: len(dock.layers.points.data) == 2)
    assert [p.positive for p in window.objects()[0].prompts] == [True, False]
    canvas.setFocus()
    QTest.keyClick(canvas, Qt.Key.Key_Z, Qt.KeyboardModifier.ControlModifier)
    until(application, lambda: len(dock.layers.points.data) == 1)
    assert len(window.objects()[0].prompts) == 1
    QTest.keyClick(canvas, Qt.Key.Key_T)
    assert dock._negative.isChecked()


def test_real_drawing_in_a_real_viewer(application, window):
    """Boxes, lassos, scribbles and the brush, drawn with the mouse."""
    from qtpy.QtCore import QPoint, Qt
    from qtpy.QtTest import QTest

    dock, canvas = window.dock, window.canvas
    middle = QPoint(canvas.width() // 2, canvas.height() // 2)

    def drag(tool: str, corners: list[tuple[int, int]]) -> None:
        dock._tools[tool].click()
        path = [middle + QPoint(*corner) for corner in corners]
        QTest.mouseMove(canvas, path[0])
        QTest.mousePress(canvas, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier, path[0])
        for start, end in zip(path, path[1:], strict=False):
            for step in range(1, 11):
                QTest.mouseMove(canvas, start + (end - start) * step / 10)
                application.processEvents()
        QTest.mouseRelease(canvas, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier, path[-1])
        application.processEvents()

    drag("Box", [(-60, -60), (60, 60)])
    (box,) = window.objects()[0].prompts
    assert isinstance(box, Box) and box.min[2] == box.max[2] == 11
    assert all(low < centre < high for low, centre, high in zip(box.min[:2], (15.5, 13.5), box.max[:2], strict=True))
    drag("Scribble", [(-30, 0), (30, 0)])
    drag("Lasso", [(-50, -50), (50, -50), (50, 50), (-50, 50), (-50, -50)])
    kinds = [type(prompt) for prompt in window.objects()[0].prompts]
    assert kinds == [Box, Scribble, Lasso], dock._status.text()
    before = dock.layers.masks.data.copy()
    drag("Paint", [(-100, -100), (-60, -100)])
    assert [type(prompt) for prompt in window.objects()[0].prompts][3:] == [Mask]
    assert (dock.layers.masks.data.astype(int) - before).sum() > 0
    for left in (3, 2, 1):
        dock._undo.click()
        assert len(window.objects()[0].prompts) == left
    assert len(dock.layers.shapes.data) == 1
