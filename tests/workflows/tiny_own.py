"""A registry of one's own, with a task that has a test split only, as BIG-bench's have."""

from elm_jax.data import registry
from elm_jax.data.templates import PromptTemplate

ROWS = [{"text": f"Is {number} even?", "label": number % 2} for number in range(20)]
PROMPT = PromptTemplate("Ask", "{{text}} ||| {{answer_choices[label]}}", "yes ||| no", ("Accuracy",))
registry.add_prompted_task("own_parity", None, PROMPT, kind="rank", role="bigbench", splits=("test",),
                           rows=lambda split: ROWS)
