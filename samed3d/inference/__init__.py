"""From prompts to masks on whole volumes: sessions, the edits and prompts in them, the crops, and files."""
