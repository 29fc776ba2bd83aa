"""The dock widget: opening, tools, objects, undo, saving. It passes requests to the controller and shows the answers.

Qt is used through ``qtpy``, with the binding that napari runs on. What a click means is in ``layers.py``, sessions are
in ``controller.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from qtpy import QtWidgets as qw
from qtpy.QtCore import Qt

from samed3d.apps.client import Client
from samed3d.apps.napari_plugin.controller import Change, Controller, error_message, open_local, open_remote
from samed3d.apps.napari_plugin.coordinates import affine_for, volume_of
from samed3d.apps.napari_plugin.layers import SessionLayers
from samed3d.apps.napari_plugin.qt_parts import ObjectTable, Worker
from samed3d.errors import InputError
from samed3d.volume import Volume, read_volume
from samed3d.volume.writing import MASK_FORMAT_NAMES, MASK_FORMATS

_TOOLS = {
    "Click": ("points", "add"),
    "Box": ("shapes", "add_rectangle"),
    "Lasso": ("shapes", "add_polygon_lasso"),
    "Scribble": ("shapes", "add_path"),
    "Paint": ("masks", "paint"),
    "Move": ("points", "select"),
}
_SAVED = {
    **{f"{name} (*{MASK_FORMATS[key][0]})": (key, MASK_FORMATS[key][0]) for key, name in MASK_FORMAT_NAMES.items()},
    "Session (*.json)": ("", ".json"),
}
_OPENED = "Images and sessions (*.nii *.nii.gz *.nrrd *.mha *.mhd *.json);;All (*)"


class PromptWidget(qw.QWidget):
    """The dock widget.

    Attributes:
        worker: Runs the session's jobs.
        controller: Of the open session, or None.
        layers: Of the open session, or None.
    """

    def __init__(self, napari_viewer: Any) -> None:
        """Called by napari with its viewer."""
        super().__init__()
        self._viewer = napari_viewer
        self.worker = Worker(self)
        self.controller: Controller | None = None
        self.layers: SessionLayers | None = None
        self._image: Any = None
        self._current = 0
        layout = qw.QVBoxLayout(self)
        for part in (self._image_box(), self._prompt_box(), self._object_box(), self._result_box()):
            layout.addWidget(part)
        self._busy = qw.QProgressBar(maximum=0, textVisible=False, maximumHeight=6, visible=False)
        selectable = Qt.TextInteractionFlag.TextSelectableByMouse
        text = "Open an image, or choose one of the viewer's."
        self._status = qw.QLabel(text, wordWrap=True, textInteractionFlags=selectable)
        layout.addWidget(self._busy)
        layout.addWidget(self._status)
        layout.addStretch(1)
        self.worker.busy_changed.connect(lambda waiting: self._busy.setVisible(waiting > 0))
        self._viewer.layers.events.inserted.connect(self._list_images)
        self._viewer.layers.events.removed.connect(self._layer_removed)
        self._viewer.bind_key("T", lambda _: self._negative.toggle(), overwrite=True)
        self._list_images()
        self._enable()

    # Opening

    def open_file(self, path: str) -> None:
        """Open an image file, a DICOM folder or a session file (``.json``) and start."""
        if path.lower().endswith(".json"):
            from samed3d.inference.session import Session

            def take(session: Session) -> None:
                self._take(session, self._add(session.volume), session.volume.notes)

            self._open(path, lambda: Session.load(path), take)
        else:
            self._open(path, lambda: read_volume(path), lambda volume: self._start(volume, self._add(volume)))

    def start_on(self, image: Any) -> None:
        """Start a session on an Image layer of the viewer."""
        self._open(image.name, lambda: volume_of(image), lambda volume: self._start(volume, image))

    def resume(self, session_id: str, image: Any) -> None:
        """Open a session that the server keeps, above the Image layer on which it was started."""
        url, token = self._url.text().strip(), self._token.text().strip()

        def take(session: Any) -> None:
            if tuple(session.size_ijk[::-1]) != tuple(np.shape(image.data)):
                expected = f"an image of {session.size_ijk} voxels, which {image.name} is not"
                raise InputError(f"session {session_id} is of {expected}")
            self._take(session, image, session.notes)

        self._open(session_id, lambda: Client(url, token or None).resume(session_id), take)

    def _open(self, name: str, job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run a job on the worker and give its result to ``then``; show the error of either."""

        def done(result: Any) -> None:
            try:
                then(result)
            except InputError as error:
                self._say(error)

        self._say(f"Opening {name} ...")
        self.worker(job, done, self._say)

    def _start(self, volume: Volume, image: Any) -> None:
        def take(session: Any) -> None:
            self._take(session, image, volume.notes)

        url, token, model = (field.text().strip() for field in (self._url, self._token, self._model))
        if url:
            self._open(f"a session on {url}", lambda: open_remote(volume, url, token, model or None), take)
        else:
            self._open("the model", lambda: open_local(volume, model or "default"), take)

    def _take(self, session: Any, image: Any, notes: tuple[str, ...]) -> None:
        """Show an open session above an Image layer, and the notes on its image."""
        self.close_session()
        self._image = image
        self.controller = Controller(session, self.worker)
        self.controller.on_change.append(self._changed)
        self.controller.on_error.append(self._say)
        self.layers = SessionLayers(self._viewer, image, self.controller, self._say)
        self.layers.depth, self.layers.radius_vox = self._depth.value(), self._radius.value()
        self._use_tool("Click")
        where = f"session {session.id} on the server" if self.controller.is_remote else "in this program"
        how = "Click on a structure; with Ctrl, or after T, on what does not belong to it."
        self._say("\n".join([f"Ready, {where}. {how}", *(f"Note: {note}" for note in notes)]))

    def _add(self, volume: Volume) -> Any:
        """Add an image to the viewer."""
        name = volume.source.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "image"
        low, high = np.percentile(volume.array[:: max(1, volume.array.shape[0] // 32), ::4, ::4], (0.5, 99.5))
        layer = self._viewer.add_image(
            volume.array,
            name=name,
            affine=affine_for(volume.grid),
            contrast_limits=(float(low), float(high)) if high > low else None,
            colormap="gray",
            units=("mm",) * 3,
        )
        self._viewer.dims.set_current_step(0, volume.array.shape[0] // 2)
        return layer

    def close_session(self) -> None:
        """Close the session and remove its layers; a server keeps its session."""
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

    # Parts of the window

    def _image_box(self) -> qw.QGroupBox:
        self._images = qw.QComboBox()
        self._model, self._url = qw.QLineEdit("default"), qw.QLineEdit(placeholderText="empty: in this program")
        self._token = qw.QLineEdit(echoMode=qw.QLineEdit.EchoMode.Password)
        self._session = qw.QLineEdit(placeholderText="empty: a new one; or the id of one on the server")
        self._start_button = _button("Start on layer", self._start_chosen)
        open_file = _button("Open a file...", lambda: self._open_chosen(folder=False))
        open_folder = _button("DICOM folder...", lambda: self._open_chosen(folder=True))
        return _box(
            "Image",
            ("Layer", self._images),
            ("Model", self._model),
            ("Server", self._url),
            ("Token", self._token),
            ("Session", self._session),
            (self._start_button, open_file, open_folder),
        )

    def _prompt_box(self) -> qw.QGroupBox:
        self._tools = {n: _button(n, lambda _=False, n=n: self._use_tool(n), checkable=True) for n in _TOOLS}
        self._negative = qw.QCheckBox("off the object (T)")
        self._negative.toggled.connect(lambda on: self.layers.choose(positive=not on) if self.layers else None)
        tip = "Slices of a box; 1 bounds the object in its slice only"
        self._depth = qw.QSpinBox(minimum=1, maximum=9999, toolTip=tip)
        self._radius = qw.QDoubleSpinBox(maximum=50, value=1)
        for field, name in ((self._depth, "depth"), (self._radius, "radius_vox")):
            field.valueChanged.connect(lambda value, n=name: setattr(self.layers, n, value) if self.layers else None)
        tip = "Its points or shapes become prompts; its selected label becomes a mask to start from"
        self._use_layer = _button("Use the selected layer", self._use_selected, toolTip=tip)
        tools = list(self._tools.values())
        fields = (("Box depth", self._depth), ("Brush radius", self._radius))
        return _box("Prompts", tools[:3], tools[3:], (self._negative,), *fields, (self._use_layer,))

    def _object_box(self) -> qw.QGroupBox:
        self._objects = ObjectTable()
        self._objects.picked.connect(lambda number: self.layers.choose(object_id=number) if self.layers else None)
        self._objects.edited.connect(lambda number, changes: self._edit(lambda s: s.edit_object(number, **changes)))
        buttons = (_button("New", self._new), _button("Colour...", self._recolour), _button("Remove", self._remove))
        self._object_parts = _box("Objects", (self._objects,), buttons)
        return self._object_parts

    def _result_box(self) -> qw.QGroupBox:
        self._undo = _button("Undo", lambda: self._edit(lambda s: s.undo()))
        self._redo = _button("Redo", lambda: self._edit(lambda s: s.redo()))
        self._suggest = _button("Where next?", self._suggest_click)
        self._save = _button("Save...", self._save_chosen)
        return _box("Result", (self._undo, self._redo), (self._suggest, self._save))

    # What the user requests

    def _start_chosen(self) -> None:
        image, session_id = self._images.currentData(), self._session.text().strip()
        if image is None:
            self._say("There is no image layer: open a file.", wrong=True)
        elif self._url.text().strip() and session_id:
            self.resume(session_id, image)
        else:
            self.start_on(image)

    def _open_chosen(self, folder: bool) -> None:
        if folder:
            path = qw.QFileDialog.getExistingDirectory(self, "Open a folder of DICOM slices")
        else:
            path, _ = qw.QFileDialog.getOpenFileName(self, "Open", "", _OPENED)
        if path:
            self.open_file(path)

    def _save_chosen(self) -> None:
        path, kind = qw.QFileDialog.getSaveFileName(self, "Save", "", ";;".join(_SAVED))
        if path:
            self.save(path, kind)

    def save(self, path: str, kind: str = next(iter(_SAVED))) -> None:
        """Write the masks; ``kind`` is one of the dialog's, whose suffix is added to a path without one."""
        format, suffix = _SAVED[kind]
        path = path if "." in path.replace("\\", "/").rsplit("/", 1)[-1] else path + suffix
        if self.controller is not None:
            self.controller.save(path, format, lambda: self._say(f"Written: {path}"))

    def _use_tool(self, name: str) -> None:
        if self.layers is None:
            return
        layer_name, mode = _TOOLS[name]
        layer = getattr(self.layers, layer_name)
        self._viewer.layers.selection.active = layer
        layer.mode = mode
        for tool, button in self._tools.items():
            button.setChecked(tool == name)

    def _use_selected(self) -> None:
        chosen = self._viewer.layers.selection.active
        if self.layers is None or chosen is None or chosen in self.layers.layers:
            self._say("Select a Points, Shapes or Labels layer of your own first.", wrong=True)
            return
        try:
            self.layers.use(chosen)
        except InputError as error:
            self._say(error)

    def _edit(self, call: Callable[[Any], Any]) -> None:
        if self.controller is not None:
            self.controller.edit(call)

    def _new(self) -> None:
        if self.controller is not None:
            self.controller.new_object()

    def _remove(self) -> None:
        if number := self._objects.chosen:
            self._edit(lambda session: session.remove_object(number))

    def _recolour(self) -> None:
        number = self._objects.chosen
        if number and (colour := qw.QColorDialog.getColor(parent=self)).isValid():
            self._edit(lambda session: session.edit_object(number, colour=colour.name()))

    def _suggest_click(self) -> None:
        def show(zyx: tuple[float, float, float], positive: bool) -> None:
            world = self.layers.points.data_to_world(zyx) if self.layers else zyx
            offset = self._viewer.dims.ndim - 3
            for axis, at in enumerate(world):
                self._viewer.dims.set_point(offset + axis, at)
            getattr(self._viewer, "scene", self._viewer).camera.center = tuple(world)
            side = "inside" if positive else "outside"
            self._say(f"Least certain here (the middle of the view): the model predicts {side}.")

        if self.controller is not None:
            self.controller.suggest_click(show)

    # What is shown

    def _changed(self, change: Change) -> None:
        chosen = self._objects.chosen
        if change.current != self._current or not chosen:
            self._current = chosen = change.current
        self._objects.fill(change.objects, chosen)
        if self.layers is not None:
            self.layers.choose(object_id=chosen or 1)
        shown = next((o for o in change.objects if o.id == change.current), None)
        if change.note:
            self._say(change.note)
        elif shown is not None and change.seconds:
            self._say(f"{shown.name}: {shown.voxels} voxels, {change.seconds:.2f} s")
        self._enable()

    def _list_images(self, _event: Any = None) -> None:
        chosen = self._images.currentData()
        self._images.clear()
        for layer in self._viewer.layers:
            if hasattr(layer, "contrast_limits"):
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
        state = self.controller.state if self.controller is not None else Change()
        fields = (self._negative, self._depth, self._radius, self._use_layer, self._object_parts, self._save)
        for part in (*self._tools.values(), *fields):
            part.setEnabled(self.controller is not None)
        self._undo.setEnabled(state.can_undo)
        self._redo.setEnabled(state.can_redo)
        self._suggest.setEnabled(any(shown.voxels for shown in state.objects))

    def _say(self, message: str | Exception, wrong: bool = False) -> None:
        """Show a message, or an error as one."""
        text = error_message(message) if isinstance(message, Exception) else message
        self._status.setStyleSheet("color: #ff6060" if wrong or text is not message else "")
        self._status.setText(text)


def _button(text: str, call: Callable[..., Any], **properties: Any) -> qw.QPushButton:
    button = qw.QPushButton(text, **properties)
    button.clicked.connect(call)
    return button


def _box(title: str, *rows: Sequence[str | qw.QWidget]) -> qw.QGroupBox:
    """A box with rows of equally wide parts, or of a label and a field."""
    box = qw.QGroupBox(title)
    grid = qw.QGridLayout(box)
    for number, row in enumerate(rows):
        column = 0
        for part in row:
            span = 2 if isinstance(part, str) else (6 - column if isinstance(row[0], str) else 6 // len(row))
            grid.addWidget(qw.QLabel(part) if isinstance(part, str) else part, number, column, 1, span)
            column += span
    return box
