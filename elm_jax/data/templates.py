"""Prompt templates for registries of one's own; they live in `data.prompts.templates`."""

from elm_jax.data.prompts.templates import PromptTemplate as PromptTemplate
