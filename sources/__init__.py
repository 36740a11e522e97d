"""Readers of preference pairs, and the order in which they come. May import system and below."""
