"""T5X's checkpoints, read and written."""
