"""Merging: arithmetic on the overlays of several experts, or on whole models, of one shape."""
