"""Layers that every network is made of."""
