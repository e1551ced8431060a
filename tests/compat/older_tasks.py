"""A registry of one's own as users wrote it before the issue, by the dotted paths that README gave them."""

from elm_jax.data import registry
from elm_jax.data.templates import PromptTemplate

_THINGS = ("parcel", "invoice", "handle", "screen", "courier", "receipt", "wheel", "card")
_FAULTS = ("is late", "is wrong", "came off", "stays dark")
_TEAMS = ("shipping", "billing", "repairs")


def rows(split: str) -> list[dict]:
    """Tickets: 24 to train on, 8 to score on."""
    first, count = {"train": (0, 24), "validation": (24, 8)}[split]
    return [{"text": f"The {_THINGS[number % 8]} {_FAULTS[number // 8]}.", "team": number % 3,
             "note": f"{_THINGS[number % 8]}: {_TEAMS[number % 3]}"} for number in range(first,
                                                                                         first + count)]


PROMPTS = (
    PromptTemplate("which team", "{{text}} Which team? ||| {{answer_choices[team]}}", " ||| ".join(_TEAMS),
                   ("Accuracy",)),
    PromptTemplate("who answers", "Who answers this? {{text}} ||| {{answer_choices[team]}}",
                   " ||| ".join(_TEAMS), ("Accuracy",)),
    PromptTemplate("sum up", "Sum up: {{text}} ||| {{note}}", None, ("ROUGE",)),
)
registry.add_mixture("tickets", [
    registry.add_prompted_task("tickets", None, prompt, role="extra", rows=rows,
                               kind="generation" if prompt.name == "sum up" else "rank")
    for prompt in PROMPTS])
registry.add_mixture("notes", ["tickets__sum_up"])
UNSEEN = (
    PromptTemplate("ask", "Is this for {{note.split(':')[0]}}? {{text}} ||| {{answer_choices[0]}}",
                   "yes ||| no", ("Accuracy",)),
    PromptTemplate("write", "Write a note: {{text}} ||| {{note}}", None, ("ROUGE",)),
)
for prompt in UNSEEN:
    registry.add_prompted_task("later_tickets", None, prompt, role="unseen_extra", splits=("validation",),
                               rows=rows, kind="generation" if prompt.name == "write" else "rank")
