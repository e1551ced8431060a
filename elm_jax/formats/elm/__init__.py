"""This program's own model folders."""
