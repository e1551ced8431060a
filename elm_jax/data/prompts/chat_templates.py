"""Chat templates: how a base wants a question framed, as a Jinja2 template that came with its tokenizer.

The template is somebody else's program: it is rendered in the sandbox of `sandbox`, with the settings and
functions that transformers gives to chat templates.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import loopcontrols

from elm_jax.data.prompts import sandbox
from elm_jax.errors import InputError, describe

KEY = "chat_template"
"""Field of a ``tokenizer_config.json`` that holds the template."""
Message = Mapping[str, str]
"""``{"role": "user", "content": text}``."""
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")


class _Refused(Exception):
    """Raised by the template itself."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may name.

    Attributes:
        text: in Jinja2.
        tokens: pairs of names, as ``eos_token``, and texts.
        where: the base that it came with, for errors.
    """

    text: str
    tokens: tuple[tuple[str, str], ...] = ()
    where: str = "the base"

    @classmethod
    def of_tokenizer(cls, config: Mapping[str, Any], where: str) -> "ChatTemplate | None":
        """Finds the template in the contents of a ``tokenizer_config.json``; None if it has none.

        Raises:
            InputError: the entry is no template, or of several templates none is called ``default``.
        """
        found = config.get(KEY)
        if isinstance(found, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
            found = named.get("default", named)
        if found is None:
            return None
        if not isinstance(found, str):
            raise InputError(describe("The base's chat template is wrong", where=where,
                                      got=repr(found)[:200], expected="a text, or several of which one is "
                                      "called default"))
        tokens = {name: _text_of(config.get(name)) for name in _TOKENS}
        return cls(found, tuple((name, text) for name, text in tokens.items() if text is not None), where)

    def render(self, messages: Sequence[Message]) -> str:
        """Renders a conversation up to where the answer begins.

        Raises:
            InputError: the template has a fault, refuses the messages, or takes too long.
        """
        fields = {**dict(self.tokens), "messages": [dict(each) for each in messages],
                  "add_generation_prompt": True, "tools": None, "documents": None}
        try:
            with sandbox.one_row(seed=0):
                return sandbox.render(_compiled(self.text), fields)
        except (jinja2.TemplateError, sandbox.TemplateLimit, _Refused, TypeError, ValueError, KeyError,
                AttributeError, IndexError, ArithmeticError, RecursionError, SyntaxError) as error:
            raise InputError(describe("The chat template cannot be rendered", where=self.where,
                                      got=f"{type(error).__name__}: {error}"[:300],
                                      cure="ask without it: --no-chat")) from error

    def ask(self, text: str) -> str:
        """Renders one question of a user."""
        return self.render([{"role": "user", "content": text}])


def _text_of(token: Any) -> str | None:
    """The text of a special token, which files give as a text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    sandbox.check_source(text)
    environment = sandbox.make_environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    environment.filters["tojson"] = _to_json
    return environment.from_string(text)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Writes JSON without the escapes that Jinja2 makes for web pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
