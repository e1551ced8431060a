"""Routing: from a task's instances to a ranking of the experts of a library."""
