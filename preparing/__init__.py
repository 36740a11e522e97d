"""Preparing pairs for training: drawn, judged, weighed. May import evaluation and below."""
