"""Chat templates against transformers' own rendering, and templates that are wrong or refuse."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from elm_jax.data.prompts import sandbox
from elm_jax.data.prompts.chat_templates import ChatTemplate
from elm_jax.errors import InputError

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You answer.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
BRACKETS = """{%- set ns = namespace(asked=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must take turns') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set ns.asked = ns.asked + 1 %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}
{#- a comment #}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
"""
BLOCKS = """
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
{{ message | tojson }}
{% endfor %}
{% set now = strftime_now('%Y') %}
{{ now | length }} {{ messages[-1].content.split('é')[0] }}
"""
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": None}
TALK = [{"role": "user", "content": "  Où est l'été <b> & \"co\"?\n"},
        {"role": "assistant", "content": " Là. "}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize("template", [CHATML, BRACKETS, BLOCKS], ids=["chatml", "brackets", "blocks"])
@pytest.mark.parametrize("messages", [TALK, TALK[:1], [{"role": "user", "content": ""}]], ids=len)
def test_a_template_renders_as_in_transformers(template, messages):
    expected, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True,
                                        bos_token="<s>", eos_token="</s>")
    found = ChatTemplate.of_tokenizer({"chat_template": template, **TOKENS}, "a base")
    assert found.render(messages) == expected[0]
    if len(messages) == 1:
        assert found.ask(messages[0]["content"]) == expected[0]


def test_a_tokenizer_may_have_no_template_or_several():
    assert ChatTemplate.of_tokenizer({}, "a base") is None
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{messages[0].role}}"}]
    assert ChatTemplate.of_tokenizer({"chat_template": several}, "a base").ask("?") == "user"
    with pytest.raises(InputError, match="tool_use"):
        ChatTemplate.of_tokenizer({"chat_template": several[:1]}, "a base")


@pytest.mark.parametrize(("template", "reason"), [
    ("{{ raise_exception('no system') }}", "no system"), ("{% if %}", "TemplateSyntaxError"),
    ("{{ messages[0].nothing.more }}", "UndefinedError"),
    ("{{ messages.__class__.__mro__ }}", "Security|unsafe"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps|seconds"),
    ("{{ a }}" * 2_001, "TemplateLimit.*2,001 parts"),
    ("{% if a %}" * 100 + "{% endif %}" * 100, "IndentationError"),
])
def test_a_template_that_fails_is_one_clear_error(template, reason, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    with pytest.raises(InputError, match=f"(?s)cannot be rendered\n  where: the base's folder.*({reason})"):
        ChatTemplate(template, where="the base's folder").ask("?")
