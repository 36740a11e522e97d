"""Judging models: prompts, scorers, images, win rates, figures. May import data.py and below."""
