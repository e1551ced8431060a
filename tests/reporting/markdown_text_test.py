"""Names and answers in a report are shown as they are, as a reader of Markdown sees them."""

import html
import random

import pytest
from markdown_it import MarkdownIt

from elm_jax.reporting.markdown_text import markdown_page, markdown_text
from elm_jax.reporting.report import markdown_table

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
NAMES = ["<script>alert(1)</script>", "a|b", "`x` ``y`", "[here](javascript:x)", "![p](http://h/p.png)",
         "*b* __c__ _d_", "__init__", "\\*", "\\", "a\\|b", "&lt;b&gt; &amp; &#60;", "~~gone~~", "# head",
         "> said", "- one", "1. one", "+ one", "---", "===", "[a]: http://h", "[a][b]", "<http://h>",
         "asset_simplification__simpler_words", "-1.5 [-2.0, 3.0]", "two\nlines\r\n\n# head", "```", "$x$",
         "a  b"]


def seen(markdown: str, tag: str) -> list[str]:
    """Texts inside a tag, as a reader of the rendered page sees them; there is no tag inside."""
    texts = [part.split(f"</{tag}>")[0] for part in READER.render(markdown).split(f"<{tag}>")[1:]]
    assert not any("<" in text for text in texts), texts
    return list(map(html.unescape, texts))


def plain(name: str) -> str:
    """The same on one line."""
    return " ".join(name.split())


def test_a_reader_of_markdown_sees_each_name_and_no_tag_of_it():
    signs = random.Random(0)
    made = ["".join(signs.choices("ab_*`|<>[]()!\\&~#-+=1.: ", k=12)) + "x" for _ in range(300)]
    for name in [*NAMES, *made]:
        assert list(map(plain, seen(markdown_text(name).strip(), "p"))) == [plain(name)], name
        table = markdown_table({"columns": [name, "n"], "rows": [[name, "1"], ["m", name]]})
        assert list(map(plain, seen(table, "th"))) == [plain(name), "n"], name
        assert list(map(plain, seen(table, "td"))) == [plain(name), "1", "m", plain(name)], name


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\u202eb", "a\0b"])
def test_signs_that_nobody_sees_are_shown_as_such(name):
    assert "\ufffd" in markdown_text(name) and len(markdown_text(name)) <= len(name)


def test_a_page_shows_values_as_they_are_and_keeps_what_is_markdown():
    page = markdown_page("# {{ title }}\n\n{{ table(grid) }}\n", title="<b> `x`", table=markdown_table,
                         grid={"columns": ["a|b"], "rows": []})
    assert seen(page, "h1") == ["<b> `x`"] and seen(page, "th") == ["a|b"]
