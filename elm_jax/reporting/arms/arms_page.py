"""Templates of the reports of studies of arms: title, verdicts, and sections of text and a table each."""

from elm_jax.reporting.page import CONTENTS, HEAD

ARMS_MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
""" + CONTENTS + """

{% for part in sections %}## {{ part.title }}

{{ part.text }}

{% if part.grid.rows %}{{ table(part.grid) }}

{% endif %}{% for name in part.pictures %}![{{ part.title }}]({{ picture(name) }})

{% endfor %}{% endfor %}"""

ARMS_HTML = HEAD + """\
{% for part in sections %}<h2 id="part{{ loop.index }}">{{ part.title }}</h2>
<p class="note">{{ part.text }}</p>
{% if part.grid.rows %}{{ show(part.grid) }}{% endif %}
{% for name in part.pictures %}<p><img alt="{{ part.title }}" src="{{ picture(name) }}"></p>
{% endfor %}{% endfor %}
</body></html>
"""
