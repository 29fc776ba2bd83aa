"""samed3d in napari: a dock widget whose prompts are points, shapes and labels of the viewer's own layers.

``controller.py`` holds a session, ``layers.py`` shows it, ``coordinates.py`` translates positions and shapes; only
``widget.py`` and ``qt_parts.py`` use Qt. ``napari.yaml`` registers the plugin.
"""
