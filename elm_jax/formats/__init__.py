"""Model formats on disk: each has a reader that gives a `model.Model`, and a writer that takes one."""
