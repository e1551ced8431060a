"""Reads rows of data sets: files, TFDS, cached P3."""
