"""Templates of reports' pages: Markdown, and self-contained HTML; of a study, and of any results."""

ABOUT_TABLE = """\
Accuracy by rank classification and ROUGE-L, in percent. A data set's value is the mean over its
prompts; a mean is over data sets. The last column is the unseen mean minus the multitask
baseline's, with the 95% interval of the paired difference (paired bootstrap over instances)."""

ABOUT_ROWS = """\
Best single expert and oracle are chosen on the very scores that they show, so they are biased
upwards; their split-half rows are chosen on one half of the instances and scored on the other, in
both directions. Random expert is the mean over all {{ num_experts }} experts. RoE picks from the
library of prompt experts; oracle and best single are among all experts. Dataset experts merged:
the mean of all of them.{{ multitask }} The ROUGE-L columns are of generated answers; beyond the letters a
to z, words are split by their script, and characters are words where a script has no spaces. Majority
answer: always the most frequent right answer of a task's scored rows, which no expert is told.
{{- by_position }}"""

ABOUT_INTERVALS = """\
95% intervals of the same cells: Wilson's score interval, for a mean over data sets combined from theirs.
The prompts of a data set share their instances, which the interval respects. Every interval of a score in
this report is of this kind, and every interval of a difference is the paired bootstrap's."""

ABOUT_CATEGORIES = """\
Seen tasks in the groups in which T0 sorts its data sets: the mean over the data sets of a group, whose
number stands in brackets, and its 95% interval."""

ABOUT_DATASETS = """\
The same tasks by data set."""

ABOUT_BENCHMARKS = """\
Each task of the benchmarks, which are scored only, with its 95% interval. Where several choices have a
score, an answer counts the score of the chosen one. Tasks without data are listed as absent."""

ABOUT_ROUTING = """\
Share of tasks that are sent to an expert of the same data set, {{ num_queries }} queries a task
from the validation split; random pick is the share that chance would send there."""

ABOUT_MARKS = """\
{% if legend %}{{ legend }}.{% endif %}"""

MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
## Results

""" + ABOUT_TABLE + """

{{ table(results) }}

""" + ABOUT_ROWS + """

""" + ABOUT_INTERVALS + """

{{ table(intervals) }}

![Unseen mean]({{ bars }})

{% if by_category.rows %}### By category

""" + ABOUT_CATEGORIES + """

{{ table(by_category) }}

{% endif %}{% if by_dataset.rows %}### By data set

""" + ABOUT_DATASETS + """

{{ table(by_dataset) }}

{% endif %}{% if benchmarks.rows %}### BIG-bench and BBH

""" + ABOUT_BENCHMARKS + """

{{ table(benchmarks) }}

{% endif %}### What was scored

{{ inputs }}
{% if worst_cut.rows %}
{{ table(worst_cut) }}
{% endif %}
## Experts by tasks

![Experts by tasks]({{ heat_map }})

## Experts on their own tasks

{{ beats }}{% if note %} {{ note }}{% endif %}

{{ table(own) }}

""" + ABOUT_MARKS + """

Dataset experts on validation rows of all prompts of their data set:

{{ table(own_datasets) }}

## Routing

""" + ABOUT_ROUTING + """

{{ table(routing) }}

Decisions for the unseen tasks:

{{ table(decisions) }}

## Time and programs

{{ table(stages) }}

{{ programs }}

{{ versions }}
"""

HEAD = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b2733; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d7dee5; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; }
th.label, td.label { text-align: left; }
thead th { border-bottom: 2px solid #7c8b99; vertical-align: bottom; white-space: normal; }
tbody tr:hover { background: #f3f6f9; }
img { max-width: 100%; height: auto; }
.note { color: #51606e; max-width: 60rem; }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>
{% endfor %}
{% macro label(grid, loop) %}{% if loop.index0 < grid.labels|default(1) %} class="label"{% endif %}
{%- endmacro %}
{% macro head(name) %}{{ name|replace("_", "_<wbr>"|safe)|replace("/", "/<wbr>"|safe) }}{% endmacro %}
{% macro show(grid) %}<table><thead><tr>
{%- for name in grid.columns %}<th{{ label(grid, loop) }}>{{ head(name) }}</th>
{%- endfor %}</tr></thead>
<tbody>{% for row in grid.rows %}<tr>
{%- for value in row %}<td{{ label(grid, loop) }}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>{% endmacro %}
"""
"""Style, title, summary and macros of an HTML page."""

HTML = HEAD + """\
<h2>Results</h2>
<p class="note">""" + ABOUT_TABLE + """</p>
{{ show(results) }}
<p class="note">""" + ABOUT_ROWS + """</p>
<p class="note">""" + ABOUT_INTERVALS + """</p>
{{ show(intervals) }}
<p><img alt="Unseen mean of every row" src="{{ bars }}"></p>
{% if by_category.rows %}<h3>By category</h3>
<p class="note">""" + ABOUT_CATEGORIES + """</p>
{{ show(by_category) }}{% endif %}
{% if by_dataset.rows %}<h3>By data set</h3>
<p class="note">""" + ABOUT_DATASETS + """</p>
{{ show(by_dataset) }}{% endif %}
{% if benchmarks.rows %}<h3>BIG-bench and BBH</h3>
<p class="note">""" + ABOUT_BENCHMARKS + """</p>
{{ show(benchmarks) }}{% endif %}
<h3>What was scored</h3>
<p>{{ inputs }}</p>
{% if worst_cut.rows %}{{ show(worst_cut) }}{% endif %}
<h2>Experts by tasks</h2>
<p><img alt="Heat map of experts by tasks" src="{{ heat_map }}"></p>
<h2>Experts on their own tasks</h2>
<p>{{ beats }}{% if note %} {{ note }}{% endif %}</p>
{{ show(own) }}
<p class="note">""" + ABOUT_MARKS + """</p>
<p class="note">Dataset experts on validation rows of all prompts of their data set:</p>
{{ show(own_datasets) }}
<h2>Routing</h2>
<p class="note">""" + ABOUT_ROUTING + """</p>
{{ show(routing) }}
<p class="note">Decisions for the unseen tasks.</p>
{{ show(decisions) }}
<h2>Time and programs</h2>
{{ show(stages) }}
<p>{{ programs }}</p>
<p class="note">{{ versions }}</p>
</body></html>
"""

RESULTS_MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
## Models by tasks

{{ table(matrix) }}

{% for name, picture in pictures %}![{{ name }}]({{ picture }})

{% endfor %}
## Scores

{{ about }}

{{ table(scores) }}
{% if legend %}
{{ legend }}.
{% endif %}
## Sample answers

{{ table(samples) }}
"""

RESULTS_HTML = HEAD + """\
<h2>Models by tasks</h2>
{{ show(matrix) }}
{% for name, picture in pictures %}<p><img alt="{{ name }}" src="{{ picture }}"></p>
{% endfor %}
<h2>Scores</h2>
<p class="note">{{ about }}</p>
{{ show(scores) }}
{% if legend %}<p class="note">{{ legend }}.</p>{% endif %}
<h2>Sample answers</h2>
{{ show(samples) }}
</body></html>
"""
