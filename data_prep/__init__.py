"""Builds corpora that ``samed3d.data`` reads. Knows files and labels, no model."""
