"""Keeps the import path `elm_jax.data.templates`; the templates are in `data.prompts.templates`."""

from elm_jax.data.prompts.templates import PromptTemplate as PromptTemplate
