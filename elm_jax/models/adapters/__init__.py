"""Adapters: what a prompt expert adds to a frozen network."""
