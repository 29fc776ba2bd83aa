"""samed3d in napari: a dock widget whose prompts are points, shapes and labels of the viewer's own layers.

``frames.py`` says where a layer's voxels are, ``layer_prompts.py`` what is drawn means, ``opening.py`` opens sessions,
``controller.py`` holds one, ``layers.py`` the layers; ``widget.py``, ``objects_table.py`` and ``worker.py`` are the
dock, and only they meet Qt.
``napari.yaml`` tells napari of it. Read ``controller.py`` next.
"""
