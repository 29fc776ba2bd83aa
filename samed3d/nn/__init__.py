"""Blocks that models are made of; they know no model and no file."""
