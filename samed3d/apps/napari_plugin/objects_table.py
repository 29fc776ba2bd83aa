"""The list of objects in the dock: seen, locked, name, voxels. What the user changes in it comes out as signals.

Used by ``widget.py``; read that next.
"""

from __future__ import annotations

from collections.abc import Iterable

from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QColor
from qtpy.QtWidgets import QTreeWidget, QTreeWidgetItem, QWidget

from samed3d.apps.napari_plugin.controller import Entry

_SEEN, _LOCKED, _NAME, _SIZE = range(4)
_ID = Qt.ItemDataRole.UserRole


class ObjectTable(QTreeWidget):
    """The objects of a session, one of them chosen.

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
        self.setColumnWidth(_SEEN, 36)
        self.setColumnWidth(_LOCKED, 40)
        self.currentItemChanged.connect(self._item_chosen)
        self.itemChanged.connect(self._item_edited)

    @property
    def chosen(self) -> int:
        """Id of the chosen object; 0 where there is none."""
        item = self.currentItem()
        return int(item.data(_NAME, _ID)) if item is not None else 0

    def fill(self, objects: Iterable[Entry], chosen: int) -> None:
        """Show these objects, one of them chosen."""
        self._filling = True
        self.clear()
        for entry in objects:
            item = QTreeWidgetItem(["", "", entry.name, str(entry.voxels)])
            item.setData(_NAME, _ID, entry.id)
            item.setFlags(item.flags() | Qt.ItemFlag.ItemIsEditable | Qt.ItemFlag.ItemIsUserCheckable)
            item.setCheckState(_SEEN, _state(entry.visible))
            item.setCheckState(_LOCKED, _state(entry.locked))
            item.setForeground(_NAME, QColor(entry.colour))
            self.addTopLevelItem(item)
            if entry.id == chosen:
                self.setCurrentItem(item)
        self._filling = False

    def _item_chosen(self, item: QTreeWidgetItem | None, _before: QTreeWidgetItem | None) -> None:
        if item is not None and not self._filling:
            self.picked.emit(self.chosen)

    def _item_edited(self, item: QTreeWidgetItem, column: int) -> None:
        if self._filling or column == _SIZE:
            return
        number = int(item.data(_NAME, _ID))
        if column == _NAME:
            self.edited.emit(number, {"name": item.text(_NAME)})
        else:
            self.edited.emit(
                number, {"visible" if column == _SEEN else "locked": item.checkState(column) == Qt.CheckState.Checked}
            )


def _state(on: bool) -> Qt.CheckState:
    return Qt.CheckState.Checked if on else Qt.CheckState.Unchecked
