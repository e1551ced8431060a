"""Renders rows as prompts: promptsource's templates, run in a sandbox."""
