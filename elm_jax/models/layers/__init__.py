"""Layers that all networks share."""
