"""Text of names, answers and messages as Markdown that shows it as it is, and nothing else."""

import re
from typing import Any

import jinja2

_SIGNS = re.compile(r"[^\W_]_+(?=[^\W_])|[\\`*|~$_]|\](?=[(\[:])")
"""Underscores inside a word, which mean nothing; else a sign of code, emphasis, tables, formulas, links."""
_BLOCK = re.compile(r"^(\s?)(?=[#>=]|[-+](?:[\s-]|$))|^(\s?\d+)(?=[.)](?:\s|$))")
"""Where a text begins as a heading, a quotation, a rule or an item of a list does."""
_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control signs, also those that turn the direction of what follows them."""


class Written(str):
    """Text that is Markdown already, as a table is."""


def markdown_text(value: Any) -> str:
    """Returns a value's text for Markdown, on one line: tags, table bars, code, links show as they are.

    Text of class `Written` comes back unchanged.
    """
    if isinstance(value, Written):
        return value
    text = _UNSEEN.sub("\ufffd", re.sub(r"\s+", " ", str(value)))
    text = _SIGNS.sub(lambda found: found[0] if len(found[0]) > 1 else f"\\{found[0]}",
                      text.replace("&", "&amp;").replace("<", "&lt;"))
    return _BLOCK.sub(r"\g<0>\\", text)


def markdown_page(template: str, **content: Any) -> str:
    """Renders a Jinja2 template of a page in Markdown; every value in it becomes `markdown_text`."""
    page = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined, finalize=markdown_text)
    return page.from_string(template).render(**content)
