"""Blocks of a network: attention, and stacks of layers."""
