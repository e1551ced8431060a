"""Rows to prompts: promptsource's templates, rendered in a sandbox."""
