"""A registry of one's own, with tasks that have a test split only, as those of BIG-bench and BBH have."""

from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.data.registry import registry

ROWS = [{"text": f"Is {number} even?", "label": number % 2} for number in range(20)]
PROMPT = PromptTemplate("Ask", "{{text}} ||| {{answer_choices[label]}}", "yes ||| no", ("Accuracy",))
registry.add_prompted_task("own_parity", None, PROMPT, kind="rank", role="bigbench", splits=("test",),
                           rows=lambda split: ROWS)
WRITTEN = PromptTemplate("Count", "{{text}} ||| {{text | length}}", None, ("ROUGE",))
registry.add_mixture("own_bbh", [
    registry.add_prompted_task("own_count", None, WRITTEN, kind="generation", role="bbh", splits=("test",),
                               rows=lambda split: ROWS),
    registry.add_prompted_task("own_missing", None, WRITTEN, kind="generation", role="bbh",
                               splits=("test",))])
"""Of the second there is no file."""
