"""Evaluation of methods with simulated prompts on labelled volumes, and reports of the results."""
