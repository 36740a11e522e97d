"""Processes, checkpoints, loader workers, files. Imports nothing of ours from outside."""
