"""The click loop in one forward, and the loop around it."""
