"""Checkpoints of other programs, read and written tensor by tensor in this program's leaf names."""
