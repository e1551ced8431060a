"""Routing: ranks the experts of a library for a task, from instances of the task."""
