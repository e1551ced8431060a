"""This program's own folders of models."""
