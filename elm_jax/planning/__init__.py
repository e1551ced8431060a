"""Cost of a compiled step on a chip: FLOPs, memory, bytes between chips."""
