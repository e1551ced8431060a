"""A template that nobody vouches for ends in time and in little room, or with one clear error."""

import resource
import time

import pytest

from elm_jax.data.prompts import sandbox
from elm_jax.data.prompts.templates import PromptTemplate
from elm_jax.errors import InputError

ROW = {"text": "some words of a row", "items": ["a", "b", "c"], "number": 3}
DOUBLED = ("{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = SUM %}{% endfor %}"
           "{{ns.s}} ||| b")

FOR_EVER = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %} ||| b",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{m(n - 1)}}{{m(n - 1)}}{% endif %}"
                                     "{% endmacro %}{{m(40)}} ||| b",
    "recursive loop": "{% for a in [[1, 2], [3]] recursive %}{{loop([[1, 2], [3]])}}{% endfor %} ||| b",
    "loop over filters": "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %} ||| b",
    "test in of a filter": "{{ range(40000)"
                           " | select('in', range(40000) | map('string') | list) | list | length }}",
    "test in of a filter, first": "{{ range(99999)"
                                  " | select('in', range(99999) | map('string') | list) | first }}",
    "test in of reject": "{{ range(99999) | reject('in', range(99999) | list) | first }}",
    "operator in": "{% set l = range(90000) | map('string') | list %}{% for a in range(90000) %}"
                   "{{ 'x' if a in l }}{% endfor %} ||| b",
    "lists alike": "{% set a = range(90000) | list %}{% set b = range(90000) | list %}"
                   "{% for i in range(90000) %}{{ 'x' if a == b }}{% endfor %} ||| b",
    "sum of lists": "{{ range(100000) | batch(1) | list | sum(start=[]) | length }}",
    "sort": "{{ ((range(90000) | map('string') | list) * 12) | sort(attribute='0') | length }}",
    "indented JSON": "{{ (range(99999) | list) | tojson(indent=99999) | length }}",
    "tags in tags": "{{ ('<!---->' * 500000) | striptags | length }}",
    "one word wrapped": "{{ ('x' * 1200000) | wordwrap(1) | length }}",
    "sums in loops": "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %} ||| b",
}
GIANTS = {
    "text times number": "{{ 'x' * 10000000000 }} ||| b",
    "number times list": "{{ 10000000000 * [1] }} ||| b",
    "power": "{{ 9 ** (9 ** 9) }} ||| b",
    "squares": "{% set ns = namespace(n=2) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}"
               "{% endfor %}{{ns.n}} ||| b",
    "width by %": "{{ '%1000000000d' % 1 }} ||| b",
    "width by % from a value": "{{ '%*d' % (1000000000, 1) }} ||| b",
    "width by format": "{{ '{:1000000000}'.format(1) }} ||| b",
    "width by format from a value": "{{ '{:{}}'.format(1, 1000000000) }} ||| b",
    "filter format": "{{ '%1000000000d' | format(1) }} ||| b",
    "ljust": "{{ 'x'.ljust(1000000000) }} ||| b",
    "expandtabs": "{{ ('\t' * 90000).expandtabs(90000) }} ||| b",
    "filter center": "{{ 'x' | center(1000000000) }} ||| b",
    "filter indent": "{{ 'x\ny' | indent(1000000000) }} ||| b",
    "filter batch": "{{ [1] | batch(1000000000, 1) | list }} ||| b",
    "doubling by ~": DOUBLED.replace("SUM", "ns.s ~ ns.s"),
    "doubling by +": DOUBLED.replace("SUM", "ns.s + ns.s"),
    "doubling by format": DOUBLED.replace("SUM", "'%s%s' % (ns.s, ns.s)"),
    "doubling by join": DOUBLED.replace("SUM", "[ns.s, ns.s] | join"),
    "doubling by method": DOUBLED.replace("SUM", "''.join([ns.s, ns.s])"),
    "doubling by list": DOUBLED.replace("SUM", "[ns.s, ns.s]"),
    "doubling by tuple": DOUBLED.replace("SUM", "(ns.s, ns.s)"),
    "doubling by dictionary": DOUBLED.replace("SUM", "{1: ns.s, 2: ns.s}"),
    "doubling by block": DOUBLED.replace("= SUM %}", "%}{{ns.s}}{{ns.s}}{% endset %}"),
    "doubling by macro": "{% macro d(s) %}{{s}}{{s}}{% endmacro %}" + DOUBLED.replace("SUM", "d(ns.s)"),
    "doubling by extend": "{% set a = [1] %}{% for i in range(60) %}{% set _ = a.extend(a) %}{% endfor %}"
                          "{{a}} ||| b",
    "doubling by namespace": DOUBLED.replace("SUM", "namespace(a=ns.s, b=ns.s)"),
    "replace": "{{ ('x' * 90000).replace('x', 'y' * 90000) }} ||| b",
    "filter replace": "{{ ('x' * 90000) | replace('x', 'y' * 90000) }} ||| b",
    "filter join": "{{ range(90000) | map('string') | join('y' * 90000) }} ||| b",
    "method join": "{{ ('y' * 90000).join(range(90000) | map('string')) }} ||| b",
    "one text in many places": "{{ (['y' * 900000] * 90000) | join }} ||| b",
    "one text written often": "{% set x = 'y' * 100000 %}{% for i in range(9999) %}{{x}}{% endfor %} ||| b",
    "text from nowhere": "{{ lipsum(n=100000) }} ||| b",
}


@pytest.fixture
def short_time(monkeypatch):
    """A tenth of a second a row, so that the test is short."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)


@pytest.mark.parametrize("jinja", [*FOR_EVER.values(), *GIANTS.values()], ids=[*FOR_EVER, *GIANTS])
def test_templates_without_end_or_measure_are_refused(short_time, jinja):
    start, room = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"(?s)Template 'bad' fails.*(TemplateLimit|UndefinedError"
                                         r"|RecursionError|ValueError|OverflowError)"):
        PromptTemplate("bad", jinja, None).parts(ROW, seed=0, truncate=False)
    assert time.thread_time() - start < 3  # one step may outlast it, none for long
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - room < 600_000  # kilobytes


@pytest.mark.parametrize("jinja", ["{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }} ||| b",
                                   "{% if 1 %}" * 990 + "{% endif %}" * 990 + " ||| b"])
def test_a_template_nested_too_deeply_is_refused(jinja):
    template = PromptTemplate("bad", jinja, None)
    with pytest.raises(InputError, match="nested too deeply"):
        template.fields()
    with pytest.raises(InputError, match=r"(?s)'bad' fails.*(RecursionError|SyntaxError)"):
        template.parts(ROW, seed=0, truncate=False)


@pytest.mark.parametrize("name", ["text times number", "doubling by block", "one text written often"])
def test_answer_choices_are_bounded_alike(short_time, name):
    with pytest.raises(InputError, match=r"(?s)fails on a row.*TemplateLimit"):
        PromptTemplate("bad", "{{text}} ||| b", GIANTS[name]).parts(ROW, seed=0, truncate=False)


@pytest.mark.parametrize("jinja", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ text.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os }}",
    "{{ (text | attr('__class__')).__mro__ }}", "{{ text['__class__']['__mro__'] }}",
    "{{ namespace.__init__.__globals__ }}", "{{ '{x.__class__.__mro__}'.format_map({'x': text}) }}",
    "{{ (elm_charged or text).__class__.__base__ }}", "{{ joiner.__call__.__globals__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{os}}", "{% extends '/etc/passwd' %}",
])
def test_python_s_internals_are_out_of_reach(jinja):
    with pytest.raises(InputError, match=r"(?s)Template 'bad' fails.*(SecurityError|UndefinedError"
                                         r"|TypeError)"):
        PromptTemplate("bad", jinja + " ||| b", None).parts(ROW, seed=0, truncate=False)


@pytest.mark.parametrize("jinja", ["{{ zip.__class__ }}", "{{ range.__self__ }}", "{{ text.__doc__ }}",
                                   "{{ '{0.__class__}'.format(text) }}", "{{ text | attr('__class__') }}"])
def test_one_step_towards_them_gives_nothing(jinja):
    assert PromptTemplate("bad", jinja + " ||| b", None).parts(ROW, seed=0, truncate=False) == ["", "b"]


@pytest.mark.parametrize("jinja, rendered", [
    ("{% for x in items %}{{loop.index}}/{{loop.length}}{{x}}{{', ' if not loop.last}}{% endfor %}",
     "1/3a, 2/3b, 3/3c"),
    ("{% for x in items | map('upper') %}{{loop.index}}/{{loop.length}}{{x}}{% endfor %}", "1/3A2/3B3/3C"),
    ("{% for k, v in {'a': [1, (2, 3)]}.items() %}{{k}}{{v}}{% else %}none{% endfor %}", "a[1, (2, 3)]"),
    ("{% for x in absent %}{{x}}{% else %}none{% endfor %}", "none"),
    ("{% set all = [] %}{% for x in items %}{{ all.append(x ~ loop.index0) or '' }}{% endfor %}"
     "{{all | join('-')}}", "a0-b1-c2"),
    ("{% set block %}{{text}}!{% endset %}{{block | upper}}", "SOME WORDS OF A ROW!"),
    ("{{ 2 ** 10 + 3 * 4 }} {{ '%05.1f' % 2.25 }} {{ '{:>4}'.format(number) }} {{ 'ab' * 2 }}",
     "1036 002.2    3 abab"),
    ("{{ dict(a=1, function=2)['function'] }}{{ [1, 2][0] }}{{ (1, 2)[1] }}", "212"),
    ("{{ 'b' in items }}{{ 'z' not in items }}{{ 'ord' in text }}{{ 1 < number <= 3 }}"
     "{{ items == ['a'] }}{{ 'x' in absent }}{{ number is eq 3 }}{{ number is in [1, 3] }}",
     "TrueTrueTrueTrueFalseFalseTrueTrue"),
    ("{{ items | select('in', ['a', 'c']) | join }}{{ items | reject('eq', 'a') | first }}"
     "{{ absent | map('upper') | list }}{{ ['a', 'A', 'b'] | unique | list }}{{ [] | select | list }}",
     "acb[]['a', 'b'][]"),
    ("{{ [[1], [2, 3]] | sum(start=[]) }}{{ [{'n': [1]}, {'n': [2]}] | sum('n', []) }}{{ [1, 2] | sum }}"
     "{{ [2, 1] | sort }}{{ [2, 1] | max }}{{ {'b': [1]} | tojson(indent=1) }}{{ 'a b' | wordwrap(1) }}",
     '[1, 2, 3][1, 2]3[1, 2]2{\n "b": [\n  1\n ]\n}a\nb'),
    ("{% macro m(x, context='c') %}{{x}}{{context}}{% endmacro %}{{ m(1, context='d') }}", "1d"),
])
def test_what_stays_within_bounds_is_as_without_them(jinja, rendered):
    plain = sandbox.jinja2.sandbox.SandboxedEnvironment().from_string(jinja).render(**ROW)
    assert PromptTemplate("good", jinja, None).parts(ROW, seed=0, truncate=False) == [rendered] == [plain]


def test_long_real_texts_are_no_giants():
    row = {"text": "A long document. " * 10_000, "items": [str(number) for number in range(5_000)]}
    jinja = ("{{text | replace('long', 'very long')}}{% for x in items %}{{x}} {% endfor %} ||| "
             "{{items | join(', ')}}")
    inputs, _ = PromptTemplate("good", jinja, None).parts(row, seed=0, truncate=False)
    assert len(inputs) > 200_000
