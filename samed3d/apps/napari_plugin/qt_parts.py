"""Qt parts of the dock widget: the list of objects, and the thread that runs the session's jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qtpy.QtCore import QObject, Qt, Signal
from qtpy.QtGui import QColor
from qtpy.QtWidgets import QTreeWidget, QTreeWidgetItem, QWidget

from samed3d.apps.napari_plugin.controller import run_now

_VISIBLE, _LOCKED, _NAME, _VOXELS = range(4)
_CHECKED, _UNCHECKED = Qt.CheckState.Checked, Qt.CheckState.Unchecked
_ID = Qt.ItemDataRole.UserRole


class ObjectTable(QTreeWidget):
    """The objects of a session: visible, locked, name, voxels. One of them is chosen.

    Attributes:
        picked: Signal with the id of the object that the user chose.
        edited: Signal with an object's id and its changes as ``Session.edit_object`` takes them.
    """

    picked = Signal(int)
    edited = Signal(int, dict)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._filling = False
        self.setRootIsDecorated(False)
        self.setHeaderLabels(["see", "lock", "name", "voxels"])
        self.setMaximumHeight(140)
        self.setColumnWidth(_VISIBLE, 36)
        self.setColumnWidth(_LOCKED, 40)
        self.currentItemChanged.connect(self._item_chosen)
        self.itemChanged.connect(self._item_edited)

    @property
    def chosen(self) -> int:
        """Id of the chosen object; 0 if there is none."""
        item = self.currentItem()
        return int(item.data(_NAME, _ID)) if item is not None else 0

    def fill(self, objects: Iterable[Any], chosen: int) -> None:
        """Show these objects, one of them chosen."""
        self._filling = True
        self.clear()
        for shown in objects:
            item = QTreeWidgetItem(["", "", shown.name, str(shown.voxels)])
            item.setData(_NAME, _ID, shown.id)
            item.setFlags(item.flags() | Qt.ItemFlag.ItemIsEditable | Qt.ItemFlag.ItemIsUserCheckable)
            item.setCheckState(_VISIBLE, _CHECKED if shown.visible else _UNCHECKED)
            item.setCheckState(_LOCKED, _CHECKED if shown.locked else _UNCHECKED)
            item.setForeground(_NAME, QColor(shown.colour))
            self.addTopLevelItem(item)
            if shown.id == chosen:
                self.setCurrentItem(item)
        self._filling = False

    def _item_chosen(self, item: QTreeWidgetItem | None, _before: QTreeWidgetItem | None) -> None:
        if item is not None and not self._filling:
            self.picked.emit(self.chosen)

    def _item_edited(self, item: QTreeWidgetItem, column: int) -> None:
        if self._filling or column == _VOXELS:
            return
        if column == _NAME:
            change: dict[str, Any] = {"name": item.text(_NAME)}
        else:
            change = {"visible" if column == _VISIBLE else "locked": item.checkState(column) == _CHECKED}
        self.edited.emit(int(item.data(_NAME, _ID)), change)


class Worker(QObject):
    """A runner for ``Controller``: one thread runs the jobs in order and reports their ends in the window's thread.

    Attributes:
        busy_changed: Signal with the number of unfinished jobs.
        waiting: Number of unfinished jobs.
    """

    busy_changed = Signal(int)
    _ended = Signal(object)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="samed3d")
        self.waiting = 0
        self._ended.connect(self._report)  # Qt queues the signal across threads

    def __call__(
        self, job: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]
    ) -> None:
        """Queue a job."""
        self.waiting += 1
        self.busy_changed.emit(self.waiting)
        report = self._ended.emit
        self._pool.submit(
            run_now,
            job,
            lambda result: report(lambda: done(result)),
            lambda error: report(lambda: failed(error)),
        )

    def stop(self) -> None:
        """Finish the running job, drop the waiting ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _report(self, call: Callable[[], None]) -> None:
        self.waiting -= 1
        try:
            call()
        finally:
            self.busy_changed.emit(self.waiting)
