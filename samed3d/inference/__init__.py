"""From prompts to masks on whole volumes: predictor (one crop), placement (which crops), session (what a user
holds).
"""
