"""Algorithms that interviews ask to write by hand (手撕), one subject a file."""
