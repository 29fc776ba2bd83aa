"""The layers of a session in a napari viewer: points and shapes are its prompts, a label map its masks; what is done to
them is an edit.

Each row of the Points and the Shapes layer carries its prompt's number: a row without one is a new prompt, a number
that is gone a removed one, a row elsewhere than before a moved one. After every edit the layers are made to show what
the session holds, so that undo, another client, or a refusal are seen at once. Painting on the label map gives the
object that mask to start from. Works on a ``ViewerModel`` without a window. Not here: buttons (``widget.py``). Read
that next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.apps.napari_plugin.controller import Change, Controller, Entry
from samed3d.apps.napari_plugin.frames import Frame
from samed3d.apps.napari_plugin.layer_prompts import (
    Drawn,
    compared,
    depth_of,
    differs,
    flat_axis,
    moved_shape,
    point_at,
    prompt_to_shape,
    shape_to_prompt,
)
from samed3d.errors import InputError
from samed3d.prompts import Point, Prompt, Scribble

POSITIVE, NEGATIVE = "#30e060", "#ff4040"
_NUMBER = "prompt"
_DOT, _LINE = 0.015, 0.003  # of the image's longest side
_FINISHED = ("added", "removed", "changed")


class SessionLayers:
    """The three layers of one session.

    Attributes:
        points: Points layer.
        shapes: Shapes layer.
        masks: Labels layer.
        object_id: That new prompts belong to.
        positive: Sign of new prompts; Ctrl turns it over for one click.
        depth: Slices of a new box.
        radius_vox: Of a new scribble's brush.
    """

    def __init__(self, viewer: Any, image: Any, controller: Controller, report: Callable[[str], None]) -> None:
        """Add the layers above ``image``, in its place in space, and show what the session holds.

        Args:
            viewer: napari's ``Viewer`` or ``ViewerModel``.
            image: The Image layer.
            controller: Of the session.
            report: Told one line when something drawn cannot be a prompt.
        """
        self._viewer, self._image, self._controller, self._report = viewer, image, controller, report
        self.object_id, self.positive, self.depth, self.radius_vox = 1, True, 1, 1.0
        self._quiet = self._turned = False
        self._dirty = False
        self._held = {"points": False, "shapes": False}
        self._ticket = 0
        self._pending: dict[int, tuple[str, Drawn, int, bool]] = {}  # by ticket: layer, what was drawn, object, sign
        self._numbers: dict[int, int] = {}  # ticket to prompt number, until the layer carries the number
        self._shown: dict[str, dict[int, NDArray]] = {"points": {}, "shapes": {}}
        self._across: dict[int, int] = {}  # the axis that a box was drawn across
        placed = {
            key: getattr(image, key)
            for key in ("scale", "translate", "rotate", "shear", "affine", "units")
            if hasattr(image, key)
        }
        spacing = np.linalg.norm(Frame.of(image).matrix[:3, :3], axis=0)
        longest = float((spacing * controller.shape_zyx).max())
        # Napari draws points in world units over the last axis' scale, whatever the affine; and edges in voxels.
        self._dot, self._line = _DOT * longest / float(abs(image.scale[-1])), _LINE * longest / float(spacing[-1])
        self.masks = viewer.add_labels(controller.labels.copy(), name="samed3d masks", opacity=0.5, **placed)
        numbered = {"features": {_NUMBER: np.zeros(0, int)}, "feature_defaults": {_NUMBER: 0}}
        self.shapes = viewer.add_shapes(
            None,
            ndim=3,
            name="samed3d shapes",
            face_color="transparent",
            edge_color=POSITIVE,
            edge_width=self._line,
            **numbered,
            **placed,
        )
        self.points = viewer.add_points(
            None,
            ndim=3,
            name="samed3d points",
            size=self._dot,
            face_color=POSITIVE,
            border_color="white",
            **numbered,
            **placed,
        )
        self.points.mouse_drag_callbacks.append(self._pressed)
        self.shapes.mouse_drag_callbacks.append(self._pressed)
        # A plugin's viewer hands out proxies, so that an event's source is not the layer that we hold.
        self.points.events.data.connect(self._points_drawn)
        self.shapes.events.data.connect(self._shapes_drawn)
        self.masks.events.paint.connect(self._painted)
        for layer in self.layers:
            layer.bind_key("Control-Z", lambda _: controller.undo(), overwrite=True)
            layer.bind_key("Control-Shift-Z", lambda _: controller.redo(), overwrite=True)
        controller.on_change.append(self._changed)
        controller.start()

    @property
    def layers(self) -> tuple[Any, Any, Any]:
        """Masks, shapes, points."""
        return self.masks, self.shapes, self.points

    def remove(self) -> None:
        """Take the layers out of the viewer and stop listening."""
        self._quiet = True
        if self._changed in self._controller.on_change:
            self._controller.on_change.remove(self._changed)
        for layer in self.layers:
            if layer in self._viewer.layers:
                self._viewer.layers.remove(layer)

    def choose(self, *, object_id: int | None = None, positive: bool | None = None) -> None:
        """Say which object new prompts belong to, and their sign."""
        self.object_id = self.object_id if object_id is None else object_id
        self.positive = self.positive if positive is None else positive
        colour = POSITIVE if self.positive else NEGATIVE
        self.points.selected_data = set()  # napari recolours what is selected
        self.shapes.selected_data = set()
        self.points.current_face_color = colour
        self.shapes.current_edge_color = colour
        if self.object_id <= np.iinfo(self.masks.data.dtype).max:
            self.masks.selected_label = self.object_id

    def use(self, layer: Any) -> None:
        """Make prompts of everything on another Points, Shapes or Labels layer, wherever that lies in the world.

        Points and shapes belong to the current object and have the current sign. Of a Labels layer the selected label
        becomes the mask that the current object starts from.

        Raises:
            InputError: if the layer is of another kind, holds nothing, or is not 3D.
        """
        frame, image = Frame.of(layer), Frame.of(self._image)
        if hasattr(layer, "selected_label"):
            self._controller.start_from(self._resampled(layer, frame, image), self.object_id)
        elif hasattr(layer, "shape_type"):
            drawn = [Drawn(str(k), frame.to(image, v)) for k, v in zip(layer.shape_type, layer.data, strict=True)]
            for prompt in [shape_to_prompt(shape, self.positive, self.depth, self.radius_vox) for shape in drawn]:
                self._controller.add(prompt, self.object_id)
        elif hasattr(layer, "border_color"):
            for at in frame.to(image, layer.data):
                self._controller.add(point_at(at, self.positive), self.object_id)
        else:
            raise InputError(f"layer {layer.name!r} must be of points, shapes or labels")

    def _resampled(self, layer: Any, frame: Frame, image: Frame) -> NDArray[np.bool_]:
        """The selected label of a layer on the image's voxels, each taking the nearest one."""
        chosen = np.asarray(layer.data) == layer.selected_label
        shape = self._controller.shape_zyx
        if chosen.shape == shape and np.allclose(frame.matrix, image.matrix, atol=1e-6):
            return chosen
        out = np.zeros(shape, bool)
        rows, columns = np.mgrid[: shape[1], : shape[2]]
        for plane in range(shape[0]):
            at = np.stack([np.full(rows.size, plane), rows.ravel(), columns.ravel()], axis=1)
            index = np.floor(image.to(frame, at) + 0.5).astype(int)
            inside = ((index >= 0) & (index < chosen.shape)).all(1)
            out[plane].reshape(-1)[inside] = chosen[tuple(index[inside].T)]
        return out

    def _pressed(self, _layer: Any, event: Any) -> Iterator[None]:
        self._turned = "Control" in event.modifiers
        yield
        while event.type == "mouse_move":
            yield

    # What the user did to a layer.

    def _rows(self, kind: str) -> list[Drawn]:
        if kind == "points":
            return [Drawn("point", np.array(at, dtype=np.float64)) for at in self.points.data]
        return [
            Drawn(str(k), np.array(v, dtype=np.float64))
            for k, v in zip(self.shapes.shape_type, self.shapes.data, strict=True)
        ]

    def _layer_numbers(self, kind: str) -> list[int]:
        features = getattr(self, kind).features
        return [int(value) for value in np.nan_to_num(np.asarray(features[_NUMBER], dtype=float))]

    def _points_drawn(self, event: Any) -> None:
        self._drawn("points", event)

    def _shapes_drawn(self, event: Any) -> None:
        self._drawn("shapes", event)

    def _drawn(self, kind: str, event: Any) -> None:
        if self._quiet:
            return
        self._held[kind] = str(event.action) not in _FINISHED
        if self._held[kind]:
            return
        numbers = [self._numbers.get(number, number) for number in self._layer_numbers(kind)]
        rows, known = self._rows(kind), self._shown[kind]
        new, kept, gone = compared(known, numbers)
        for number in gone:
            self._controller.remove(number)
        for index in kept:
            if differs(rows[index].vertices_zyx, known[numbers[index]]):
                self._move(numbers[index], rows[index])
        positive, self._turned = self.positive != self._turned, False
        asked = []
        for index in new:
            self._ticket -= 1
            numbers[index] = self._ticket
            self._pending[self._ticket] = (kind, rows[index], self.object_id, positive)
            asked.append(self._ticket)
        self._set_numbers(kind, numbers)
        for ticket in asked:
            self._add(ticket)

    def _add(self, ticket: int) -> None:
        kind, drawn, object_id, positive = self._pending[ticket]
        try:
            if kind == "points":
                prompt: Prompt = point_at(drawn.vertices_zyx, positive)
            else:
                prompt = shape_to_prompt(drawn, positive, self.depth, self.radius_vox)
        except InputError as error:
            del self._pending[ticket]
            self._report(str(error))
            self._show(self._controller.state)
            return
        across = flat_axis(drawn.vertices_zyx) if kind == "shapes" else 0

        def known(number: int) -> None:
            self._pending.pop(ticket, None)
            if number:
                self._numbers[ticket], self._across[number] = number, across

        self._controller.add(prompt, object_id, known)

    def _move(self, number: int, drawn: Drawn) -> None:
        before = next(
            (entry.prompts[number] for entry in self._controller.state.objects if number in entry.prompts), None
        )
        if before is None:
            return
        try:
            if isinstance(before, Point):
                self._controller.move(number, point_at(drawn.vertices_zyx, before.positive))
                return
            depth = depth_of(before, self._across.get(number, 0))
            self._across[number] = flat_axis(drawn.vertices_zyx)
            self._controller.move(number, moved_shape(before, drawn, depth))
        except InputError as error:
            self._report(str(error))
            self._show(self._controller.state)

    def _painted(self, _event: Any) -> None:
        if not self._quiet:
            self._dirty = True
            self._controller.painted(self.masks.data)

    # What the session holds.

    def _changed(self, change: Change) -> None:
        if self._dirty:  # what was painted and refused lies outside what changed
            self.masks.data[...] = self._controller.labels
            self._dirty = False
            self.masks.refresh()
        elif not change.region.is_empty:
            self.masks.data[change.region.slices] = change.labels
            self.masks.refresh()
        self._show(change)

    def _show(self, state: Change) -> None:
        self._quiet = True
        try:
            self._colour(state)
            visible = [entry for entry in state.objects if entry.visible]
            for kind in ("points", "shapes"):
                self._show_rows(kind, visible)
        finally:
            self._quiet = False

    def _colour(self, state: Change) -> None:
        from napari.utils.colormaps import DirectLabelColormap

        colours: dict[int | None, Any] = {None: "#ffffff", 0: "transparent"}
        colours.update({entry.id: entry.colour for entry in state.objects})
        old = getattr(self, "_colours", None)
        if colours != old:
            self._colours = colours
            self.masks.colormap = DirectLabelColormap(color_dict=dict(colours))

    def _show_rows(self, kind: str, entries: list[Entry]) -> None:
        layer = getattr(self, kind)
        if self._held[kind]:  # under the user's hand; the end of that comes back here
            return
        wanted: dict[int, tuple[Drawn, str, str, float]] = {}
        for entry in entries:
            for number, prompt in entry.prompts.items():
                drawn = self._as_drawn(kind, number, prompt)
                if drawn is not None:
                    sign = POSITIVE if getattr(prompt, "positive", True) else NEGATIVE
                    width = 2 * prompt.radius_vox + 1 if isinstance(prompt, Scribble) else self._line
                    wanted[number] = (drawn, sign, entry.colour, width)
        for ticket, (of, drawn, _, positive) in self._pending.items():
            if of == kind:
                wanted[ticket] = (drawn, POSITIVE if positive else NEGATIVE, "#ffffff", self._line)
        self._shown[kind] = {number: drawn.vertices_zyx for number, (drawn, *_) in wanted.items() if number > 0}
        numbers = [self._numbers.get(number, number) for number in self._layer_numbers(kind)]
        rows = self._rows(kind)
        same = sorted(numbers) == sorted(wanted) and not any(
            differs(row.vertices_zyx, wanted[number][0].vertices_zyx) for row, number in zip(rows, numbers, strict=True)
        )
        if not same:
            numbers = list(wanted)
            layer.selected_data = set()
            self._set_rows(kind, [wanted[number][0] for number in numbers])
        self._set_numbers(kind, numbers)
        self._set_looks(kind, [wanted[number] for number in numbers])
        self._numbers = {ticket: number for ticket, number in self._numbers.items() if number not in self._shown[kind]}

    def _as_drawn(self, kind: str, number: int, prompt: Prompt) -> Drawn | None:
        if isinstance(prompt, Point):
            return Drawn("point", np.array(prompt.at[::-1])) if kind == "points" else None
        return prompt_to_shape(prompt, self._across.get(number, 0)) if kind == "shapes" else None

    def _set_rows(self, kind: str, rows: list[Drawn]) -> None:
        if kind == "points":
            self.points.data = np.array([row.vertices_zyx for row in rows]).reshape(-1, 3)
        else:
            self.shapes.data = []
            if rows:
                self.shapes.add([row.vertices_zyx for row in rows], shape_type=[row.kind for row in rows])

    def _set_numbers(self, kind: str, numbers: list[int]) -> None:
        layer = getattr(self, kind)
        if self._layer_numbers(kind) != numbers:
            layer.features = {_NUMBER: np.array(numbers, dtype=int)}
        layer.feature_defaults = {_NUMBER: 0}

    def _set_looks(self, kind: str, looks: list[tuple[Drawn, str, str, float]]) -> None:
        if not looks:
            return
        if kind == "points":
            self.points.face_color = [sign for _, sign, _, _ in looks]
            self.points.border_color = [colour for _, _, colour, _ in looks]
        else:
            self.shapes.edge_color = [sign for _, sign, _, _ in looks]
            self.shapes.edge_width = [width for *_, width in looks]
