"""Blocks that models are made of; they depend on no model and read no file."""
