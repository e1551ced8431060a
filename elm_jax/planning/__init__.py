"""What a compiled step costs on a chip: FLOPs, memory, bytes between chips."""
