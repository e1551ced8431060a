"""Renders and tokenises tasks, and keeps the arrays."""
