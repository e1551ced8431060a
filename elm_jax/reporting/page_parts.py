"""Parts of every report: who made it and when, its contents, cells that a click opens, pictures inside."""

import base64
import dataclasses
import html
import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

import jinja2

from elm_jax.reporting.markdown_text import Written, markdown_page
from elm_jax.reporting.page import CONTENTS
from elm_jax.runtime import storage

SHORT, LONG = 60, 300
"""Characters of a long text that HTML shows before a click, and that Markdown shows at all."""


@dataclasses.dataclass(frozen=True)
class Made:
    """When a report was made, by which command, with which versions.

    Attributes:
        command: as it was typed; None for Python code.
        date: UTC time, ISO 8601.
    """

    command: str | None = None
    date: str = dataclasses.field(default_factory=storage.utc_now)

    def sentence(self) -> str:
        """Says it in words."""
        by = "Python code" if self.command is None else self.command
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("elm_jax", "jax"))
        return f"Written {self.date} by: {by} ({versions})."


@dataclasses.dataclass(frozen=True)
class Folded:
    """A long text of a cell, of which HTML shows the beginning, and all of it after a click."""

    full: str

    @property
    def short(self) -> str:
        """Its beginning, on one line."""
        return cut(self.full, SHORT)

    def __str__(self) -> str:
        return cut(self.full, LONG)


def fold(text: Any) -> str | Folded:
    """A text as a cell: folded if it is long or has several lines."""
    text = str(text)
    return text if len(text) <= SHORT and "\n" not in text else Folded(text)


def cut(text: Any, length: int) -> str:
    """A text on one line, of at most `length` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[:length - 1] + "…"


def html_page(template: str, pictures: Mapping[str, bytes], **content: Any) -> str:
    """Renders a page of HTML that needs no other file; what comes from names is escaped.

    Args:
        template: a Jinja2 template of `page`.
        pictures: PNG by the name of its file, with which the template calls ``picture``.
        content: the other values of the template.
    """
    def picture(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode(pictures[name]).decode()

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return _with_contents(page.from_string(template).render(
        **content, picture=picture, pictures=list(pictures)))


def _with_contents(page: str) -> str:
    """Puts links to the headings where the template has the place for them."""
    found = re.findall(r'<h2 id="([^"]*)">([^<]*)</h2>', page)
    links = "".join(f'<li><a href="#{html.escape(key)}">{title}</a></li>' for key, title in found)
    return page.replace(CONTENTS, f"<nav><ul>{links}</ul></nav>", 1)


def markdown_of(template: str, pictures: Mapping[str, bytes], **content: Any) -> str:
    """Renders a page of Markdown, with the pictures as files beside it."""
    page = markdown_page(template, **content, picture=Written, pictures=list(pictures))
    links = "\n".join(f"- [{title}](#{title.lower().replace(' ', '-')})"
                      for title in re.findall(r"^## (.+)$", page, re.MULTILINE))
    return page.replace(CONTENTS, links, 1)
