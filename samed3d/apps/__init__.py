"""Programs on top of the session: the demo, and whatever has a user in front of it."""
