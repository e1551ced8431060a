"""Data sets that TFDS has under another name, or with other fields, than the Hugging Face hub.

promptsource's templates, and so all tasks, go by the hub's fields. trec's labels are numbered in another
order in TFDS; rows get both numberings, under the field names of each version of promptsource's templates.
"""

from typing import Any

from elm_jax.data import tfds_rows
from elm_jax.data.tfds_rows import TfdsName

_TFDS_COARSE = ("DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC")
_TFDS_FINE = (
    "manner", "cremat", "animal", "exp", "ind", "gr", "title", "def", "date", "reason", "event", "state",
    "desc", "count", "other", "letter", "religion", "food", "country", "color", "termeq", "city", "body",
    "dismed", "mount", "money", "product", "period", "substance", "sport", "plant", "techmeth", "volsize",
    "instru", "abb", "speed", "word", "lang", "perc", "code", "dist", "temp", "symbol", "ord", "veh",
    "weight", "currency",
)
_HUB_FINE = {
    "ABBR": ("abb", "exp"),
    "ENTY": ("animal", "body", "color", "cremat", "currency", "dismed", "event", "food", "instru", "lang",
             "letter", "other", "plant", "product", "religion", "sport", "substance", "symbol", "techmeth",
             "termeq", "veh", "word"),
    "DESC": ("def", "desc", "manner", "reason"),
    "HUM": ("gr", "ind", "title", "desc"),
    "LOC": ("city", "country", "mount", "other", "state"),
    "NUM": ("code", "count", "date", "dist", "money", "ord", "other", "period", "perc", "speed", "temp",
            "volsize", "weight"),
}
_HUB_COARSE = tuple(_HUB_FINE)
_HUB_NUMBER = {pair: number for number, pair in enumerate(
    (coarse, fine) for coarse, fines in _HUB_FINE.items() for fine in fines)}


def trec_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the hub's labels beside TFDS's, which package 0.2.3's templates read."""
    coarse, fine = _TFDS_COARSE[row["label_coarse"]], _TFDS_FINE[row["label_fine"]]
    return {**row, "coarse_label": _HUB_COARSE.index(coarse), "fine_label": _HUB_NUMBER[coarse, fine]}


def ag_news_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose text is title and description, as on the hub."""
    return {"text": f"{row['title']} {row['description']}", "label": row["label"]}


NAMES = {
    ("ag_news", None): TfdsName("ag_news_subset", adapt=ag_news_row),
    ("imdb", None): TfdsName("imdb_reviews/plain_text"),
    ("trec", None): TfdsName("trec", {"label-coarse": "label_coarse", "label-fine": "label_fine"}, trec_row),
    ("anli", "r1"): TfdsName("anli/r1", {"context": "premise"}),
    ("anli", "r2"): TfdsName("anli/r2", {"context": "premise"}),
    ("anli", "r3"): TfdsName("anli/r3", {"context": "premise"}),
}

for _key, _name in NAMES.items():
    tfds_rows.add_name(*_key, _name)
