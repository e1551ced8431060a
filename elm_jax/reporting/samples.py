"""Sample predictions: on each task a right answer and a wrong one, of several models on the same rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from elm_jax.reporting.page_parts import fold

Predictions = Sequence[Mapping[str, Any]]
MOST_LINES = 400
"""Lines of the table; the tasks that come after are counted in words."""
GOOD_ROUGE = 0.5
"""ROUGE-L from which on a written text stands among the right answers."""
COLUMNS = ("task", "row", "model", "answer", "right", "right answer", "prompt")


def is_right(found: Mapping[str, Any]) -> bool:
    """Whether an answer is right; of a text, whether it is much like the right one."""
    return found["correct"] > 0 if "correct" in found else found.get("rouge_l", 0.0) >= GOOD_ROUGE


def verdict(found: Mapping[str, Any]) -> str:
    """Says how right an answer is."""
    if "correct" in found:
        return {0: "no", 1: "yes"}.get(found["correct"], f"{100 * found['correct']:.1f}")
    return f"ROUGE-L {100 * found['rouge_l']:.1f}" if "rouge_l" in found else "–"


def chosen_rows(of: Predictions, prompts: Mapping[int, str], each: int = 1) -> list[int]:
    """Indices of rows to show: the first right and the first wrong answers, `each` of both.

    Rows whose prompts are known go first. Where all answers are right, or all wrong, there are more of those.
    """
    order = sorted(of, key=lambda found: found["index"] not in prompts)  # stable
    right = [found["index"] for found in order if is_right(found)]
    wrong = [found["index"] for found in order if not is_right(found)]
    shown = right[:each] + wrong[:each]
    return sorted(shown + (right[each:] + wrong[each:])[:2 * each - len(shown)])


def samples_of_task(task: str, models: Mapping[str, Predictions], prompts: Mapping[int, str], by: str,
                    each: int = 1) -> list[list[Any]]:
    """Lines of the table for one task, of several models on the same rows; shared cells stand in the first.

    Args:
        task: name.
        models: name -> predictions, of which every one has the rows that are shown, or is left out there.
        prompts: by index, of as many rows as are known.
        by: the model by whose right and wrong answers the rows are chosen.
        each: so many right ones and so many wrong ones.
    """
    known = {name: {found["index"]: found for found in own} for name, own in models.items()}
    lines = []
    for index in chosen_rows(models[by], prompts, each):
        answers = {name: own[index] for name, own in known.items() if index in own}
        prompt = fold(prompts[index]) if index in prompts else "–"
        for number, (name, found) in enumerate(answers.items()):
            own = [name, fold(found["prediction"]), verdict(found)]
            first = [task, str(index), *own, fold(right_answers(found)), prompt]
            lines.append(["", "", *own, "", ""] if number else first)
    return lines


def right_answers(found: Mapping[str, Any]) -> str:
    """The right answer of a row; all of them where there are several."""
    several = found.get("right") or found.get("references")
    return " | ".join(map(str, several)) if several else str(found["target"])


def samples_table(lines: Sequence[list[Any]]) -> dict[str, Any]:
    """A grid of about the first `MOST_LINES` lines; ``left`` counts the tasks of which it shows none."""
    tasks = [number for number, line in enumerate(lines) if line[0]]
    end = next((number for number in tasks if number >= MOST_LINES), len(lines))
    left = {line[0] for line in lines[end:]} - {line[0] for line in lines[:end]}
    return {"columns": list(COLUMNS), "rows": list(lines[:end]), "labels": len(COLUMNS), "left": len(left)}
