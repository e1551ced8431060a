"""Where a data set's rows come from, of those that ``datasets.load_dataset(name, config)`` does not give.

`elm tasks check` prints these. Files are wanted as JSON lines in the layout of
`elm_jax.data.sources.row_files`.
"""

from elm_jax.tasks import bbh, bigbench, compositional

from elm_jax.data.registry import registry

ORIGINS = {
    **{("anli", config): f"datasets.load_dataset('anli'): train_{config} as train.jsonl, dev_{config} as "
       "validation.jsonl" for config in ("r1", "r2", "r3")},
    ("story_cloze", "2016"): "ask for it at cs.rochester.edu/nlp/rocstories (a form to fill in), and write "
                             "its csv as JSON lines",
    ("haiku", None): "ThomasScialom/T0_continual_learning on GitHub (fields en1, en2)",
    ("twitter_top20", None): "ThomasScialom/T0_continual_learning on GitHub (the fields that its templates "
                             "in tasks/templates read)",
}
for _task in (*bigbench.RANKED, *bigbench.GENERATED):
    ORIGINS["bigbench", _task] = (
        f"google/BIG-bench on GitHub, benchmark_tasks/{_task}: its examples as "
        f"bigbench/{_task}.jsonl (input, target_scores or target), its prefixes in bigbench/tasks.json")
for _task in (*bbh.FIXED, *bbh.OPTIONS, *bbh.GENERATED):
    ORIGINS["bbh", _task] = (f"suzgunmirac/BIG-Bench-Hard on GitHub, bbh/{_task}.json: its examples as "
                             f"bbh/{_task}.jsonl (input, target)")
for _code in compositional.LANGUAGES:
    ORIGINS["xsum_translated", _code] = (
        "xsum with its summaries translated, by a translator of your choice (document, summary)")

for (_dataset, _config), _text in ORIGINS.items():
    registry.add_origin(_dataset, _config, _text)
