"""The layers of a session in a napari viewer: points and shapes are its prompts, a label map shows its masks.

Each row of the Points and the Shapes layer carries its prompt's number: a row without one is a new prompt, a missing
number a removed one, a row at another position a moved one. After every edit the layers are set to what the session
holds, so that undo, another client's edit or a refusal is visible at once. Works on a ``ViewerModel`` without a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from samed3d.apps.napari_plugin import coordinates
from samed3d.apps.napari_plugin.controller import Change, Controller
from samed3d.apps.napari_plugin.coordinates import Drawn, Frame
from samed3d.errors import InputError
from samed3d.prompts import Point, Prompt, Scribble

POSITIVE, NEGATIVE = "#30e060", "#ff4040"
_NUMBER = "prompt"
_DOT, _LINE = 0.015, 0.003  # of the image's longest side
_FINISHED = ("added", "removed", "changed")
_PLACE = ("scale", "translate", "rotate", "shear", "affine", "units")


@dataclass(frozen=True)
class Row:
    """A row of the Points or the Shapes layer as it should look."""

    drawn: Drawn
    sign: str
    colour: str
    width: float


@dataclass(frozen=True)
class Pending:
    """A drawn prompt that the session has not answered yet."""

    kind: str
    drawn: Drawn
    object_id: int
    positive: bool


class SessionLayers:
    """The three layers of one session.

    Attributes:
        points: Points layer.
        shapes: Shapes layer.
        masks: Labels layer.
        layers: The three, masks first.
        object_id: The object of new prompts.
        positive: Sign of new prompts; Ctrl reverses it for one click.
        depth: Slices of a new box.
        radius_vox: Radius of a new scribble's brush.
    """

    def __init__(self, viewer: Any, image: Any, controller: Controller, report: Callable[[Exception], None]) -> None:
        """Add the layers above ``image``, at its position in space, and show what the session holds.

        Args:
            viewer: napari's ``Viewer`` or ``ViewerModel``.
            image: The Image layer.
            controller: The session's.
            report: Called with the error when something drawn cannot be a prompt.
        """
        self._viewer, self._image, self._controller, self._report = viewer, image, controller, report
        self.object_id, self.positive, self.depth, self.radius_vox = 1, True, 1, 1.0
        self._updating = self._reversed = self._painting = False
        self._colours: dict[int | None, Any] = {}
        self._held = {"points": False, "shapes": False}
        self._ticket = 0
        self._pending: dict[int, Pending] = {}  # by ticket, a number below zero that stands in for the prompt's
        self._numbers: dict[int, int] = {}  # ticket to prompt number, until the layer carries the number
        self._shown: dict[str, dict[int, NDArray]] = {"points": {}, "shapes": {}}
        self._across: dict[int, int] = {}  # the axis across which a box was drawn
        placed = {key: getattr(image, key) for key in _PLACE if hasattr(image, key)}
        spacing = np.linalg.norm(Frame.of(image).matrix[:3, :3], axis=0)
        longest = float((spacing * controller.shape_zyx).max())
        # Napari draws points in world units over the last axis' scale, whatever the affine; and edges in voxels.
        dot, self._line = _DOT * longest / float(abs(image.scale[-1])), _LINE * longest / float(spacing[-1])
        self.masks = viewer.add_labels(controller.labels.copy(), name="samed3d masks", opacity=0.5, **placed)
        placed |= {"ndim": 3, "features": {_NUMBER: np.zeros(0, int)}, "feature_defaults": {_NUMBER: 0}}
        edges = {"face_color": "transparent", "edge_color": POSITIVE, "edge_width": self._line}
        self.shapes = viewer.add_shapes(None, name="samed3d shapes", **edges, **placed)
        dots = {"size": dot, "face_color": POSITIVE, "border_color": "white"}
        self.points = viewer.add_points(None, name="samed3d points", **dots, **placed)
        self.layers = (self.masks, self.shapes, self.points)
        # A plugin's viewer hands out proxies, so the source of an event is not the layer that is kept here.
        for kind, layer in (("points", self.points), ("shapes", self.shapes)):
            layer.mouse_drag_callbacks.append(self._pressed)
            layer.events.data.connect(lambda event, kind=kind: self._drawn(kind, event))
        self.masks.events.paint.connect(self._painted)
        for layer in self.layers:
            layer.bind_key("Control-Z", lambda _: controller.edit(lambda s: s.undo()), overwrite=True)
            layer.bind_key("Control-Shift-Z", lambda _: controller.edit(lambda s: s.redo()), overwrite=True)
        controller.on_change.append(self._changed)
        controller.start()

    def remove(self) -> None:
        """Remove the layers from the viewer and stop listening."""
        self._updating = True
        if self._changed in self._controller.on_change:
            self._controller.on_change.remove(self._changed)
        for layer in self.layers:
            if layer in self._viewer.layers:
                self._viewer.layers.remove(layer)

    def choose(self, *, object_id: int | None = None, positive: bool | None = None) -> None:
        """Set the object of new prompts, and their sign."""
        self.object_id = self.object_id if object_id is None else object_id
        self.positive = self.positive if positive is None else positive
        self.points.selected_data = set()  # napari recolours what is selected
        self.shapes.selected_data = set()
        self.points.current_face_color = self.shapes.current_edge_color = POSITIVE if self.positive else NEGATIVE
        if self.object_id <= np.iinfo(self.masks.data.dtype).max:
            self.masks.selected_label = self.object_id

    def use(self, layer: Any) -> None:
        """Make prompts of everything on another Points, Shapes or Labels layer, wherever it lies in the world.

        Points and shapes belong to the current object and have the current sign. The current object restarts from the
        selected label of a Labels layer.

        Raises:
            InputError: if the layer is of another kind, holds nothing, or is not 3D.
        """
        frame, image = Frame.of(layer), Frame.of(self._image)
        if hasattr(layer, "selected_label"):
            self._controller.start_from(self._resampled(layer, frame, image), self.object_id)
            return
        if hasattr(layer, "shape_type"):
            drawn = [Drawn(str(k), frame.to(image, v)) for k, v in zip(layer.shape_type, layer.data, strict=True)]
            prompts = [
                coordinates.shape_to_prompt(shape, self.positive, self.depth, self.radius_vox) for shape in drawn
            ]
        elif hasattr(layer, "border_color"):
            prompts = [coordinates.point_at(at, self.positive) for at in frame.to(image, layer.data)]
        else:
            raise InputError(f"layer {layer.name!r} must be of points, shapes or labels")
        for prompt in prompts:
            self._edit("add", prompt, self.object_id)

    def _resampled(self, layer: Any, frame: Frame, image: Frame) -> NDArray[np.bool_]:
        """The selected label of a layer on the image's voxels, by the nearest voxel."""
        selected = np.asarray(layer.data) == layer.selected_label
        shape = self._controller.shape_zyx
        if selected.shape == shape and np.allclose(frame.matrix, image.matrix, atol=1e-6):
            return selected
        onto = np.linalg.solve(frame.matrix, image.matrix)
        found = affine_transform(selected.view(np.uint8), onto, output_shape=shape, order=0, mode="grid-constant")
        return found.view(bool)

    # From the layers to the session.

    def _pressed(self, _layer: Any, event: Any) -> Iterator[None]:
        self._reversed = "Control" in event.modifiers
        yield
        while event.type == "mouse_move":
            yield

    def _painted(self, _event: Any) -> None:
        if not self._updating:
            self._painting = True
            self._controller.painted(self.masks.data)

    def _rows(self, kind: str) -> list[Drawn]:
        layer = getattr(self, kind)
        names = ["point"] * len(layer.data) if kind == "points" else layer.shape_type
        return [Drawn(str(k), np.array(v, dtype=np.float64)) for k, v in zip(names, layer.data, strict=True)]

    def _stored_numbers(self, kind: str) -> list[int]:
        """The numbers that a layer's rows carry; some may be tickets that were answered meanwhile."""
        features = getattr(self, kind).features
        return [int(value) for value in np.nan_to_num(np.asarray(features[_NUMBER], dtype=float))]

    def _row_numbers(self, kind: str) -> list[int]:
        """The prompt number of each row, or its ticket."""
        return [self._numbers.get(number, number) for number in self._stored_numbers(kind)]

    def _drawn(self, kind: str, event: Any) -> None:
        """Turn what the user did to a layer into edits."""
        if self._updating:
            return
        self._held[kind] = str(event.action) not in _FINISHED
        if self._held[kind]:
            return
        numbers, rows, known = self._row_numbers(kind), self._rows(kind), self._shown[kind]
        new, kept, gone = coordinates.compared(known, numbers)
        for number in gone:
            self._edit("remove", number)
        for index in kept:
            if coordinates.differs(rows[index].vertices_zyx, known[numbers[index]]):
                self._move(numbers[index], rows[index])
        positive, self._reversed = self.positive != self._reversed, False
        tickets = []
        for index in new:
            self._ticket -= 1
            numbers[index] = self._ticket
            self._pending[self._ticket] = Pending(kind, rows[index], self.object_id, positive)
            tickets.append(self._ticket)
        self._set_numbers(kind, numbers)
        for ticket in tickets:
            self._add(ticket)

    def _add(self, ticket: int) -> None:
        pending = self._pending[ticket]
        vertices = pending.drawn.vertices_zyx
        try:
            if pending.kind == "points":
                prompt: Prompt = coordinates.point_at(vertices, pending.positive)
            else:
                prompt = coordinates.shape_to_prompt(pending.drawn, pending.positive, self.depth, self.radius_vox)
        except InputError as error:
            del self._pending[ticket]
            self._refuse(error)
            return

        def answered(number: int) -> None:
            self._pending.pop(ticket, None)
            if number:
                self._numbers[ticket] = number
                self._across[number] = coordinates.flat_axis(vertices) if pending.kind == "shapes" else 0

        self._controller.edit(lambda session: session.add(prompt, pending.object_id), answered)

    def _move(self, number: int, drawn: Drawn) -> None:
        holders = [shown for shown in self._controller.state.objects if number in shown.numbered]
        if not holders:
            return
        before = self._controller.in_voxels(holders[0].numbered[number])
        try:
            if isinstance(before, Point):
                to: Prompt = coordinates.point_at(drawn.vertices_zyx, before.positive)
            else:
                to = coordinates.moved_shape(before, drawn, self._across.get(number, 0))
                self._across[number] = coordinates.flat_axis(drawn.vertices_zyx)
        except InputError as error:
            self._refuse(error)
            return
        self._edit("move", number, to)

    def _edit(self, method: str, *arguments: Any) -> None:
        self._controller.edit(lambda session: getattr(session, method)(*arguments))

    def _refuse(self, error: InputError) -> None:
        self._report(error)
        self._show(self._controller.state)

    # From the session to the layers.

    def _changed(self, change: Change) -> None:
        if self._painting:  # paint that was refused lies outside what changed
            self.masks.data[...] = self._controller.labels
        elif not change.region.is_empty:
            self.masks.data[change.region.slices] = change.labels
        if self._painting or not change.region.is_empty:
            self.masks.refresh()
        self._painting = False
        self._show(change)

    def _show(self, state: Change) -> None:
        from napari.utils.colormaps import DirectLabelColormap

        self._updating = True
        try:
            colours: dict[int | None, Any] = {None: "#ffffff", 0: "transparent"}
            colours.update({shown.id: shown.colour for shown in state.objects})
            if colours != self._colours:
                self._colours = colours
                self.masks.colormap = DirectLabelColormap(color_dict=dict(colours))
            visible = [shown for shown in state.objects if shown.visible]
            for kind in ("points", "shapes"):
                if not self._held[kind]:  # a layer under the user's hand is updated when the gesture ends
                    self._show_rows(kind, self._wanted(kind, visible))
        finally:
            self._updating = False

    def _wanted(self, kind: str, visible: Iterable[Any]) -> dict[int, Row]:
        """The rows that a layer should have, by prompt number or ticket."""
        wanted: dict[int, Row] = {}
        for shown in visible:
            for number, given in shown.numbered.items():
                prompt = self._controller.in_voxels(given)
                drawn = coordinates.prompt_to_shape(prompt, self._across.get(number, 0))
                if isinstance(prompt, Point):
                    drawn = Drawn("point", np.array(prompt.at[::-1]))
                if drawn is not None and (drawn.kind == "point") == (kind == "points"):
                    sign = POSITIVE if getattr(prompt, "positive", True) else NEGATIVE
                    width = 2 * prompt.radius_vox + 1 if isinstance(prompt, Scribble) else self._line
                    wanted[number] = Row(drawn, sign, shown.colour, width)
        for ticket, sent in self._pending.items():
            if sent.kind == kind:
                wanted[ticket] = Row(sent.drawn, POSITIVE if sent.positive else NEGATIVE, "#ffffff", self._line)
        return wanted

    def _show_rows(self, kind: str, wanted: dict[int, Row]) -> None:
        layer, numbers = getattr(self, kind), self._row_numbers(kind)
        self._shown[kind] = {number: row.drawn.vertices_zyx for number, row in wanted.items() if number > 0}
        same = sorted(numbers) == sorted(wanted) and not any(
            coordinates.differs(row.vertices_zyx, wanted[number].drawn.vertices_zyx)
            for row, number in zip(self._rows(kind), numbers, strict=True)
        )
        if not same:
            numbers = list(wanted)
            layer.selected_data = set()
            vertices = [row.drawn.vertices_zyx for row in wanted.values()]
            layer.data = np.array(vertices).reshape(-1, 3) if kind == "points" else []
            if kind == "shapes" and vertices:
                layer.add(vertices, shape_type=[row.drawn.kind for row in wanted.values()])
        self._set_numbers(kind, numbers)
        if rows := [wanted[number] for number in numbers]:
            signs = [row.sign for row in rows]
            if kind == "points":
                layer.face_color, layer.border_color = signs, [row.colour for row in rows]
            else:
                layer.edge_color, layer.edge_width = signs, [row.width for row in rows]
        self._numbers = {ticket: number for ticket, number in self._numbers.items() if number not in self._shown[kind]}

    def _set_numbers(self, kind: str, numbers: list[int]) -> None:
        layer = getattr(self, kind)
        if self._stored_numbers(kind) != numbers:
            layer.features = {_NUMBER: np.array(numbers, dtype=int)}
        layer.feature_defaults = {_NUMBER: 0}
