"""The dock: what to open, the tools, the objects, undo, saving. It only asks the controller and shows what that says.

Qt through ``qtpy``, with whatever binding napari runs on. Not here: what a click means (``layers.py``), sessions
(``controller.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QCheckBox,
    QColorDialog,
    QComboBox,
    QDoubleSpinBox,
    QFileDialog,
    QFormLayout,
    QGridLayout,
    QGroupBox,
    QLabel,
    QLineEdit,
    QProgressBar,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from samed3d.apps.client import RemoteError
from samed3d.apps.napari_plugin.controller import Change, Controller
from samed3d.apps.napari_plugin.frames import affine_for, volume_of
from samed3d.apps.napari_plugin.layers import SessionLayers
from samed3d.apps.napari_plugin.objects_table import ObjectTable
from samed3d.apps.napari_plugin.opening import load_local, open_local, open_remote, resume_remote
from samed3d.apps.napari_plugin.worker import Worker
from samed3d.errors import InputError
from samed3d.volume import Volume, read_volume

_TOOLS = {
    "Click": ("points", "add"),
    "Box": ("shapes", "add_rectangle"),
    "Lasso": ("shapes", "add_polygon_lasso"),
    "Scribble": ("shapes", "add_path"),
    "Paint": ("masks", "paint"),
    "Move": ("points", "select"),
}
_SAVED = {
    "NIfTI label map (*.nii.gz)": ("nifti", ".nii.gz"),
    "NRRD label map (*.nrrd)": ("nrrd", ".nrrd"),
    "3D Slicer segmentation (*.seg.nrrd)": ("seg.nrrd", ".seg.nrrd"),
    "DICOM-SEG (*.dcm)": ("dicom-seg", ".dcm"),
    "RTSTRUCT (*.dcm)": ("rtstruct", ".dcm"),
    "Session (*.json)": ("", ".json"),
}


class PromptWidget(QWidget):
    """The dock widget.

    Attributes:
        worker: Does the session's jobs.
        controller: Of the open session, or None.
        layers: Of the open session, or None.
    """

    def __init__(self, napari_viewer: Any) -> None:
        """Made by napari, which gives its viewer."""
        super().__init__()
        self._viewer = napari_viewer
        self.worker = Worker(self)
        self.controller: Controller | None = None
        self.layers: SessionLayers | None = None
        self._image: Any = None
        self._current = 0
        layout = QVBoxLayout(self)
        for part in (self._opening_box(), self._prompt_box(), self._object_box(), self._result_box()):
            layout.addWidget(part)
        self._busy = QProgressBar()
        self._busy.setRange(0, 0)
        self._busy.setTextVisible(False)
        self._busy.setMaximumHeight(6)
        self._busy.setVisible(False)
        self._status = QLabel("Open an image, or choose one of the viewer's.")
        self._status.setWordWrap(True)
        self._status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout.addWidget(self._busy)
        layout.addWidget(self._status)
        layout.addStretch(1)
        self.worker.busy_changed.connect(lambda waiting: self._busy.setVisible(waiting > 0))
        self._viewer.layers.events.inserted.connect(self._list_images)
        self._viewer.layers.events.removed.connect(self._layer_removed)
        self._viewer.bind_key("T", self._turn, overwrite=True)
        self._list_images()
        self._enable()

    # Opening.

    def open_file(self, path: str) -> None:
        """Open an image file, a DICOM folder or a session file (``.json``) and start."""
        self._say(f"Opening {path} ...")
        if path.lower().endswith(".json"):
            self.worker(
                lambda: load_local(path), lambda session: self._take(session, session.volume, None), self._failed
            )
            return
        self.worker(lambda: read_volume(path), lambda volume: self._start(volume, self._added(volume)), self._failed)

    def start_on(self, image: Any) -> None:
        """Start a session on an Image layer of the viewer."""
        self._say(f"Opening {image.name} ...")
        self.worker(lambda: volume_of(image), lambda volume: self._start(volume, image), self._failed)

    def resume(self, session_id: str, image: Any) -> None:
        """Go on with a session that the server keeps, above the Image layer that it was begun on."""
        url, token = self._url.text().strip(), self._token.text().strip()

        def found(session: Any) -> None:
            if tuple(session.size_ijk[::-1]) != tuple(np.shape(image.data)):
                self._say(
                    f"session {session_id} is of an image of {session.size_ijk} voxels, which {image.name} is not",
                    wrong=True,
                )
                return
            self._take(session, None, image)

        self.worker(lambda: resume_remote(session_id, url, token), found, self._failed)

    def _start(self, volume: Volume, image: Any) -> None:
        url, token, model = self._url.text().strip(), self._token.text().strip(), self._model.text().strip()
        self._say("Loading the model ..." if not url else f"Sending the image to {url} ...")
        if url:
            self.worker(
                lambda: open_remote(volume, url, token, model or None),
                lambda s: self._take(s, volume, image),
                self._failed,
            )
        else:
            self.worker(
                lambda: open_local(volume, model or "default"), lambda s: self._take(s, volume, image), self._failed
            )

    def _take(self, session: Any, volume: Volume | None, image: Any) -> None:
        """Show a session that is open."""
        self.close_session()
        assert volume is not None or image is not None
        self._image = image if image is not None else self._added(volume)
        self.controller = Controller(session, self.worker)
        self.controller.on_change.append(self._changed)
        self.controller.on_error.append(lambda message: self._say(message, wrong=True))
        self.layers = SessionLayers(
            self._viewer, self._image, self.controller, lambda message: self._say(message, wrong=True)
        )
        self.layers.depth, self.layers.radius_vox = self._depth.value(), self._radius.value()
        self._use_tool("Click")
        where = f"session {session.id} on the server" if self.controller.is_remote else "in this program"
        self._say(f"Ready, {where}. Click on a structure; Ctrl+click or T: off it.")

    def _added(self, volume: Volume | None) -> Any:
        assert volume is not None
        name = volume.source.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "image"
        low, high = np.percentile(volume.array[:: max(1, volume.array.shape[0] // 32), ::4, ::4], (0.5, 99.5))
        limits = (float(low), float(high)) if high > low else None
        layer = self._viewer.add_image(
            volume.array,
            name=name,
            affine=affine_for(volume.grid),
            contrast_limits=limits,
            colormap="gray",
            units=("mm",) * 3,
        )
        self._viewer.dims.set_current_step(0, volume.array.shape[0] // 2)
        return layer

    def close_session(self) -> None:
        """Let go of the session and take its layers away; a session on a server stays there."""
        if self.layers is not None:
            self.layers.remove()
        if self.controller is not None:
            self.controller.close()
        self.controller = self.layers = None
        self._enable()

    def closeEvent(self, event: Any) -> None:  # noqa: N802 - Qt's name
        """Stop the thread with the window."""
        self.worker.stop()
        super().closeEvent(event)

    # Parts of the window.

    def _opening_box(self) -> QGroupBox:
        box = QGroupBox("Image")
        form = QFormLayout(box)
        self._images = QComboBox()
        self._model, self._url, self._token, self._session = QLineEdit("default"), QLineEdit(), QLineEdit(), QLineEdit()
        self._session.setPlaceholderText("empty: a new one; or the id of one on the server")
        self._url.setPlaceholderText("empty: in this program")
        self._token.setEchoMode(QLineEdit.EchoMode.Password)
        form.addRow("Layer", self._images)
        form.addRow("Model", self._model)
        form.addRow("Server", self._url)
        form.addRow("Token", self._token)
        form.addRow("Session", self._session)
        self._start_button = _button("Start on layer", self._start_chosen)
        row = QGridLayout()
        row.addWidget(self._start_button, 0, 0)
        row.addWidget(_button("Open a file...", self._ask_file), 0, 1)
        row.addWidget(_button("DICOM folder...", self._ask_folder), 0, 2)
        form.addRow(row)
        return box

    def _prompt_box(self) -> QGroupBox:
        box = QGroupBox("Prompts")
        grid = QGridLayout(box)
        self._tools = {name: _button(name, lambda _=False, name=name: self._use_tool(name)) for name in _TOOLS}
        for index, button in enumerate(self._tools.values()):
            button.setCheckable(True)
            grid.addWidget(button, index // 3, index % 3)
        self._negative = QCheckBox("off the object (T)")
        self._negative.toggled.connect(lambda on: self.layers.choose(positive=not on) if self.layers else None)
        self._depth, self._radius = QSpinBox(), QDoubleSpinBox()
        self._depth.setRange(1, 9999)
        self._depth.setToolTip("Slices of a box; 1 bounds the object in its slice only")
        self._depth.valueChanged.connect(lambda value: setattr(self.layers, "depth", value) if self.layers else None)
        self._radius.setRange(0, 50)
        self._radius.setValue(1)
        self._radius.valueChanged.connect(
            lambda value: setattr(self.layers, "radius_vox", value) if self.layers else None
        )
        grid.addWidget(self._negative, 2, 0, 1, 3)
        grid.addWidget(QLabel("Box depth"), 3, 0)
        grid.addWidget(self._depth, 3, 1, 1, 2)
        grid.addWidget(QLabel("Brush radius"), 4, 0)
        grid.addWidget(self._radius, 4, 1, 1, 2)
        self._use_layer = _button("Use the selected layer", self._use_selected)
        self._use_layer.setToolTip(
            "Its points or shapes become prompts; the selected label of a Labels layer becomes a mask to start from"
        )
        grid.addWidget(self._use_layer, 5, 0, 1, 3)
        return box

    def _object_box(self) -> QGroupBox:
        box = QGroupBox("Objects")
        grid = QGridLayout(box)
        self._objects = ObjectTable()
        self._objects.picked.connect(lambda number: self.layers.choose(object_id=number) if self.layers else None)
        self._objects.edited.connect(
            lambda number, changes: self.controller.edit_object(number, **changes) if self.controller else None
        )
        grid.addWidget(self._objects, 0, 0, 1, 3)
        for column, (name, call) in enumerate(
            (("New", self._new), ("Colour...", self._recolour), ("Remove", self._remove))
        ):
            grid.addWidget(_button(name, call), 1, column)
        self._object_parts = box
        return box

    def _result_box(self) -> QGroupBox:
        box = QGroupBox("Result")
        grid = QGridLayout(box)
        self._undo = _button("Undo", lambda: self.controller.undo() if self.controller else None)
        self._redo = _button("Redo", lambda: self.controller.redo() if self.controller else None)
        self._suggest = _button("Where next?", self._suggest_click)
        self._save = _button("Save...", self._ask_save)
        for index, button in enumerate((self._undo, self._redo, self._suggest, self._save)):
            grid.addWidget(button, index // 2, index % 2)
        return box

    # What the user asks for.

    def _start_chosen(self) -> None:
        image = self._images.currentData()
        if image is None:
            self._say("There is no image layer: open a file.", wrong=True)
        elif self._url.text().strip() and self._session.text().strip():
            self.resume(self._session.text().strip(), image)
        else:
            self.start_on(image)

    def _ask_file(self) -> None:
        path, _ = QFileDialog.getOpenFileName(
            self, "Open", "", "Images and sessions (*.nii *.nii.gz *.nrrd *.mha *.mhd *.json);;All (*)"
        )
        if path:
            self.open_file(path)

    def _ask_folder(self) -> None:
        path = QFileDialog.getExistingDirectory(self, "Open a folder of DICOM slices")
        if path:
            self.open_file(path)

    def _ask_save(self) -> None:
        path, chosen = QFileDialog.getSaveFileName(self, "Save", "", ";;".join(_SAVED))
        if path:
            self.save(path, chosen)

    def save(self, path: str, kind: str = "NIfTI label map (*.nii.gz)") -> None:
        """Write the masks; ``kind`` is one of the dialog's, and its suffix is added where there is none."""
        format, suffix = _SAVED[kind]
        path = path if "." in path.replace("\\", "/").rsplit("/", 1)[-1] else path + suffix
        if self.controller is not None:
            self.controller.save(path, format, lambda: self._say(f"Written: {path}"))

    def _use_tool(self, name: str) -> None:
        if self.layers is None:
            return
        layer = getattr(self.layers, _TOOLS[name][0])
        self._viewer.layers.selection.active = layer
        layer.mode = _TOOLS[name][1]
        for tool, button in self._tools.items():
            button.setChecked(tool == name)

    def _turn(self, _viewer: Any = None) -> None:
        self._negative.setChecked(not self._negative.isChecked())

    def _use_selected(self) -> None:
        chosen = self._viewer.layers.selection.active
        if self.layers is None or chosen is None or chosen in self.layers.layers:
            self._say("Select a Points, Shapes or Labels layer of your own first.", wrong=True)
            return
        try:
            self.layers.use(chosen)
        except InputError as error:
            self._say(str(error), wrong=True)

    def _new(self) -> None:
        if self.controller is not None:
            self.controller.new_object()

    def _remove(self) -> None:
        number = self._objects.chosen
        if self.controller is not None and number:
            self.controller.remove_object(number)

    def _recolour(self) -> None:
        number = self._objects.chosen
        if self.controller is None or not number:
            return
        colour = QColorDialog.getColor(parent=self)
        if colour.isValid():
            self.controller.edit_object(number, colour=colour.name())

    def _suggest_click(self) -> None:
        def show(zyx: tuple[float, float, float], positive: bool) -> None:
            world = self.layers.points.data_to_world(zyx) if self.layers else zyx
            offset = self._viewer.dims.ndim - 3
            for axis, at in enumerate(world):
                self._viewer.dims.set_point(offset + axis, at)
            getattr(self._viewer, "scene", self._viewer).camera.center = tuple(world)
            self._say(
                f"Least certain here (the middle of the view): the model says {'inside' if positive else 'outside'}."
            )

        if self.controller is not None:
            self.controller.suggest_click(show)

    # What there is to show.

    def _changed(self, change: Change) -> None:
        moved_on = change.current != self._current
        self._current = change.current
        chosen = change.current if moved_on or not self._objects.chosen else self._objects.chosen
        self._objects.fill(change.objects, chosen)
        if self.layers is not None:
            self.layers.choose(object_id=chosen or 1)
        entry = next((e for e in change.objects if e.id == change.current), None)
        if change.note or (entry is not None and change.seconds):
            said = "" if entry is None else f"{entry.name}: {entry.voxels} voxels, {change.seconds:.2f} s"
            self._say(change.note or said)
        self._enable()

    def _list_images(self, _event: Any = None) -> None:
        ours = self.layers.layers if self.layers is not None else ()
        chosen = self._images.currentData()
        self._images.clear()
        for layer in self._viewer.layers:
            if hasattr(layer, "contrast_limits") and layer not in ours:
                self._images.addItem(layer.name, layer)
                if layer == chosen:
                    self._images.setCurrentIndex(self._images.count() - 1)
        self._start_button.setEnabled(self._images.count() > 0)

    def _layer_removed(self, event: Any) -> None:
        self._list_images()
        if self.layers is not None and (event.value == self._image or event.value in self.layers.layers):
            self.close_session()
            self._say("The session was closed with its layer.")

    def _enable(self) -> None:
        is_open = self.controller is not None
        state = self.controller.state if self.controller is not None else None
        for part in (
            *self._tools.values(),
            self._negative,
            self._depth,
            self._radius,
            self._use_layer,
            self._object_parts,
            self._save,
        ):
            part.setEnabled(is_open)
        self._undo.setEnabled(state is not None and state.can_undo)
        self._redo.setEnabled(state is not None and state.can_redo)
        self._suggest.setEnabled(state is not None and any(entry.voxels for entry in state.objects))

    def _failed(self, error: Exception) -> None:
        known = isinstance(error, InputError | RemoteError)
        self._say(str(error) if known else f"this is our fault: {type(error).__name__}: {error}", wrong=True)

    def _say(self, message: str, wrong: bool = False) -> None:
        self._status.setStyleSheet("color: #ff6060" if wrong else "")
        self._status.setText(message)


def _button(text: str, call: Callable[..., Any]) -> QPushButton:
    button = QPushButton(text)
    button.clicked.connect(call)
    return button
