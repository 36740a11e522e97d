"""Readers of preference pairs, all ending in one schema. May import system and below."""
