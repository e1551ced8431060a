"""Adapters: the parameters that a prompt expert adds to a frozen network."""
