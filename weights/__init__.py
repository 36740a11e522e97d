"""Readers and writers of models in the formats that people have. May import system and below."""
