"""Templates of reports: Markdown, and self-contained HTML; of a study, of any results, of a library."""

CONTENTS = "<!--contents-->"
"""Where the links to a page's headings stand."""

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

ABOUT_ROUTERS = """\
What each router picks from the library of prompt experts, by the same queries and by priors from this very
study: {{ routers.priors.tasks }} tasks of {{ routers.priors.datasets }} data sets in
{{ routers.priors.families }} families, of which a task's own data set and family are left out, and experts on
their own data sets. Q = 1 is the mean over the queries, each alone; Q = 0 has no example, but the text of the
template. Scores are means over {{ routers.num_datasets }} data sets in percent, with 95% intervals of drawing
data sets again. Regret: the split-half oracle's score minus the router's. Gap closed: of the gap between a
random expert and the split-half oracle; a dash where there is no gap beyond its interval. Home: the share of
tasks that go to an expert of the same data set. Routers with rows choose on one half of a task's rows and are
scored on the other, in both directions."""

ABOUT_MARKS = """\
{% if legend %}{{ legend }}.{% endif %}"""

ABOUT_SAMPLES = """\
Of each task a right answer and a wrong one, as far as there are both, and what {{ sampled }} on these rows.
{%- if samples.left %} {{ samples.left }} more tasks are left out.{% endif %}"""

ABOUT_CURVES = """\
Loss by step of training, one panel an expert, from the logs of the runs.
{%- if curves_left %} {{ curves_left }} more experts are left out.{% endif %}"""

ABOUT_LOADS = """\
What the routers of sparse layers did while training, over the last tenth of the lines of each run's
router.jsonl. A load is an expert's share of the choices, before any is dropped; even loads would be 1/E,
marked in the scale of each picture. Entropy is the mean of the router's probabilities'; balance is K for even
loads.
{%- if loads.informed %} Information is the mutual information of task and expert over the choices: 0 if all
tasks use the experts alike.{% endif %}
{%- if loads.left %} {{ loads.left }} more runs have no picture.{% endif %}"""

LOADS_MARKDOWN = """\
## Router loads

""" + ABOUT_LOADS + """

{{ table(loads.grid) }}

{% for name, caption in loads.plots %}![{{ caption }}]({{ picture(name) }})

{% endfor %}"""

LOADS_HTML = """\
<h2 id="loads">Router loads</h2>
<p class="note">""" + ABOUT_LOADS + """</p>
{{ show(loads.grid) }}
{% for name, caption in loads.plots %}<p><img alt="{{ caption }}" src="{{ picture(name) }}"></p>
{% endfor %}"""

NO_CARDS = """\
No card was found near these results; `--experts DIR` says where the experts are."""

MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
""" + CONTENTS + """

## Results

""" + ABOUT_TABLE + """

{{ table(results) }}

""" + ABOUT_MARKS + """

""" + ABOUT_ROWS + """

""" + ABOUT_INTERVALS + """

{{ table(intervals) }}

![Unseen mean]({{ picture("bars.png") }})

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

![Experts by tasks]({{ picture("heat_map.png") }})

## Experts on their own tasks

{{ beats }}{% if note %} {{ note }}{% endif %}

{{ table(own) }}

""" + ABOUT_MARKS + """

Dataset experts on validation rows of all prompts of their data set:

{{ table(own_datasets) }}

## Sample answers

""" + ABOUT_SAMPLES + """

{{ table(samples) }}

## Experts

{% if cards.rows %}{{ table(cards) }}{% else %}""" + NO_CARDS + """{% endif %}

{% if "learning_curves.png" in pictures %}## Learning curves

""" + ABOUT_CURVES + """

![Loss by step]({{ picture("learning_curves.png") }})

{% endif %}{% if loads %}""" + LOADS_MARKDOWN + """{% endif %}## Routing

""" + ABOUT_ROUTING + """

{{ table(routing) }}

Decisions for the unseen tasks:

{{ table(decisions) }}

{% if routers %}## Routers

""" + ABOUT_ROUTERS + """

{% for line in routers.lines %}{{ line }}

{% endfor %}{{ table(routers.grid) }}

{% endif %}## Time and programs

{{ table(stages) }}

{{ programs }}

{{ versions }}
"""

HEAD = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --ink: #1b2733; --pale: #51606e; --line: #d7dee5; --page: #fff;
  --row: #f3f6f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ec; --pale: #a3b0bc; --line: #38444f;
  --page: #14191e; --row: #1d252c; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--page); overflow-wrap: anywhere; }
h1 { line-height: 1.2; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 14px; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page); text-align: left; }
th.label, td.label { text-align: left; }
td.label { white-space: normal; overflow-wrap: break-word; max-width: 30rem; }
td.wide { min-width: 13rem; }
thead th { border-bottom: 2px solid var(--pale); vertical-align: bottom; white-space: normal; }
tbody tr:hover td { background: var(--row); }
details { max-width: 36rem; }
details div { white-space: pre-wrap; margin: .3rem 0; }
summary { cursor: pointer; }
img { max-width: 100%; height: auto; background: #fff; }
nav ul { padding-left: 1.2rem; columns: 14rem; }
a { color: inherit; }
.note { color: var(--pale); max-width: 60rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .7rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .3rem .45rem; }
  th:first-child, td:first-child { max-width: 34vw; min-width: 20vw; white-space: normal;
    overflow-wrap: break-word; }
}
</style></head><body>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>
{% endfor %}
""" + CONTENTS + """
{% macro label(grid, loop) %}{% if loop.index0 < grid.labels|default(1) %} class="label"{% endif %}
{%- endmacro %}
{% macro head(name) %}{{ name|replace("_", "_<wbr>"|safe)|replace("/", "/<wbr>"|safe) }}{% endmacro %}
{% macro cell(value) %}{% if value.full is defined %}<details><summary>{{ value.short }}</summary><div>
{{- value.full }}</div></details>{% else %}{{ head(value) }}{% endif %}{% endmacro %}
{% macro kind(grid, loop, value) %}{% if loop.index0 < grid.labels|default(1) %} class="label
{%- if value.full is defined %} wide{% endif %}"{% endif %}{% endmacro %}
{% macro show(grid) %}<div class="table"><table><thead><tr>
{%- for name in grid.columns %}<th{{ label(grid, loop) }}>{{ head(name) }}</th>
{%- endfor %}</tr></thead>
<tbody>{% for row in grid.rows %}<tr>
{%- for value in row %}<td{{ kind(grid, loop, value) }}>{{ cell(value) }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endmacro %}
"""
"""Style, title, summary, contents and macros of an HTML page."""

EXPERTS = """\
<h2 id="samples">Sample answers</h2>
<p class="note">""" + ABOUT_SAMPLES + """</p>
{{ show(samples) }}
<h2 id="experts">Experts</h2>
{% if cards.rows %}{{ show(cards) }}{% else %}<p class="note">""" + NO_CARDS + """</p>{% endif %}
{% if "learning_curves.png" in pictures %}<h2 id="curves">Learning curves</h2>
<p class="note">""" + ABOUT_CURVES + """</p>
<p><img alt="Loss by step of every expert" src="{{ picture("learning_curves.png") }}"></p>
{% endif %}{% if loads %}""" + LOADS_HTML + """{% endif %}"""
"""What is shown of experts beside their scores."""

HTML = HEAD + """\
<h2 id="results">Results</h2>
<p class="note">""" + ABOUT_TABLE + """</p>
{{ show(results) }}
<p class="note">""" + ABOUT_MARKS + """</p>
<p class="note">""" + ABOUT_ROWS + """</p>
<p class="note">""" + ABOUT_INTERVALS + """</p>
{{ show(intervals) }}
<p><img alt="Unseen mean of every row" src="{{ picture("bars.png") }}"></p>
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
<h2 id="heat-map">Experts by tasks</h2>
<p><img alt="Heat map of experts by tasks" src="{{ picture("heat_map.png") }}"></p>
{% if matrix.rows %}<details><summary>The same numbers as a table</summary>
{{ show(matrix) }}</details>{% endif %}
<h2 id="own">Experts on their own tasks</h2>
<p>{{ beats }}{% if note %} {{ note }}{% endif %}</p>
{{ show(own) }}
<p class="note">""" + ABOUT_MARKS + """</p>
<p class="note">Dataset experts on validation rows of all prompts of their data set:</p>
{{ show(own_datasets) }}
""" + EXPERTS + """
<h2 id="routing">Routing</h2>
<p class="note">""" + ABOUT_ROUTING + """</p>
{{ show(routing) }}
<p class="note">Decisions for the unseen tasks.</p>
{{ show(decisions) }}
{% if routers %}<h2 id="routers">Routers</h2>
<p class="note">""" + ABOUT_ROUTERS + """</p>
{% for line in routers.lines %}<p>{{ line }}</p>
{% endfor %}{{ show(routers.grid) }}
{% endif %}<h2 id="time">Time and programs</h2>
{{ show(stages) }}
<p>{{ programs }}</p>
<p class="note">{{ versions }}</p>
</body></html>
"""

RESULTS_MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
""" + CONTENTS + """

## Models by tasks

{{ table(matrix) }}

""" + ABOUT_MARKS + """

{% for name, caption in plots %}![{{ caption }}]({{ picture(name) }})

{% endfor %}
{% if skipped %}{{ skipped }}

{% endif %}
## Scores

{{ about }}

{{ table(scores) }}

## Sample answers

""" + ABOUT_SAMPLES + """

{{ table(samples) }}

## Experts

{% if cards.rows %}{{ table(cards) }}{% else %}""" + NO_CARDS + """{% endif %}

{% if "learning_curves.png" in pictures %}## Learning curves

""" + ABOUT_CURVES + """

![Loss by step]({{ picture("learning_curves.png") }})

{% endif %}{% if loads %}""" + LOADS_MARKDOWN + """{% endif %}"""

RESULTS_HTML = HEAD + """\
<h2 id="models">Models by tasks</h2>
{{ show(matrix) }}
<p class="note">""" + ABOUT_MARKS + """</p>
{% for name, caption in plots %}<p><img alt="{{ caption }}" src="{{ picture(name) }}"></p>
{% endfor %}
{% if skipped %}<p class="note">{{ skipped }}</p>{% endif %}
<h2 id="scores">Scores</h2>
<p class="note">{{ about }}</p>
{{ show(scores) }}
""" + EXPERTS + """
</body></html>
"""

RUNS_MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
""" + LOADS_MARKDOWN

RUNS_HTML = HEAD + LOADS_HTML + """</body></html>
"""

ABOUT_SHARES = """\
Each key is asked without itself: the share of an expert's keys whose nearest other key is its own, and to
whom the others go. A task is routed by such votes."""

ABOUT_PAIRS = """\
The experts whose keys are most alike, candidates for duplicates: the mean over the keys of both of the
similarity with the nearest key of the other."""

ABOUT_SCORES = """\
{% if sources %}From {{ sources }}. Each expert on its own tasks, with the interval that the results hold, and
the base there; last its mean accuracy over other tasks.
{%- if scores.left %} Left out, as of other weights of the same name: {{ scores.left }}.{% endif %}
{%- else %}No results were found beside the library; `--results FILE` names them.{% endif %}"""

LIBRARY_MARKDOWN = """\
# {{ title }}

{% for line in summary %}{{ line }}

{% endfor %}
{% for line in verified %}{{ line }}

{% endfor %}
""" + CONTENTS + """

## Experts

{{ table(experts) }}

## Scores

""" + ABOUT_SCORES + """

{% if scores.rows %}{{ table(scores) }}
{% endif %}
## Routing between experts

""" + ABOUT_SHARES + """

{{ table(shares) }}

![Shares of keys by expert]({{ picture(routing_picture) }})

## Nearest pairs

""" + ABOUT_PAIRS + """

{{ table(pairs) }}
"""

LIBRARY_HTML = HEAD + """\
{% for line in verified %}<p>{{ line }}</p>
{% endfor %}
<h2 id="experts">Experts</h2>
{{ show(experts) }}
<h2 id="scores">Scores</h2>
<p class="note">""" + ABOUT_SCORES + """</p>
{% if scores.rows %}{{ show(scores) }}{% endif %}
<h2 id="routing">Routing between experts</h2>
<p class="note">""" + ABOUT_SHARES + """</p>
{{ show(shares) }}
<p><img alt="Shares of keys by expert" src="{{ picture(routing_picture) }}"></p>
<h2 id="pairs">Nearest pairs</h2>
<p class="note">""" + ABOUT_PAIRS + """</p>
{{ show(pairs) }}
</body></html>
"""
