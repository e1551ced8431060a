"""Merging: arithmetic on overlays of one shape."""
