"""Hugging Face's model folders."""
