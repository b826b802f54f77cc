"""The transformer and its parts: single-device code."""
