"""Data sets that TFDS has under another name, or with other fields, than the Hugging Face hub.

promptsource's templates, and so all tasks, go by the hub's fields. trec's labels are numbered in another
order in TFDS; rows get both numberings, under the field names of each version of promptsource's templates.

hellaswag's rows in TFDS hold the context whole, and story_cloze's so as well: templates that read parts of it
cannot be served by them. A ``huggingface:`` data set may lie in the same folder, so rows that have the hub's
fields already are left as they are.
"""

from typing import Any

from elm_jax.data.sources import tfds_rows
from elm_jax.data.sources.tfds_rows import TfdsName

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


def hellaswag_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose label is a text, as on the hub, where that of a row without one is empty."""
    label = row["label"]
    return row if isinstance(label, str) else {**row, "label": str(label) if label >= 0 else ""}


def winogrande_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the number of the right option, counted from 1, as text."""
    if "answer" in row:
        return row
    return {**row, "answer": str(row["label"] + 1) if row["label"] >= 0 else ""}


def _anli(part: str) -> tuple[TfdsName, ...]:
    """TFDS's own, and the hub's, which has all parts in one."""
    splits = {"train": f"train_{part}", "validation": f"dev_{part}", "test": f"test_{part}"}
    hub = [TfdsName(name, splits=splits) for name in ("huggingface:anli/plain_text", "huggingface:anli")]
    return TfdsName(f"anli/{part}", {"context": "premise"}), *hub


NAMES = {
    ("ag_news", None): (TfdsName("ag_news_subset", adapt=ag_news_row, adds=("text",)),),
    ("imdb", None): (TfdsName("imdb_reviews/plain_text"),),
    ("trec", None): (TfdsName("trec", {"label-coarse": "label_coarse", "label-fine": "label_fine"},
                              trec_row, ("coarse_label", "fine_label")),),
    ("anli", "r1"): _anli("r1"),
    ("anli", "r2"): _anli("r2"),
    ("anli", "r3"): _anli("r3"),
    ("cnn_dailymail", "3.0.0"): (TfdsName("cnn_dailymail"),),
    ("cos_e", "v1.11"): (TfdsName("cos_e"),),
    ("hellaswag", None): (TfdsName("hellaswag", {"context": "ctx"}, hellaswag_row),),
    ("paws", "labeled_final"): (TfdsName("paws_wiki/labeled_final_tokenized"),),
    ("winogrande", "winogrande_xl"): (TfdsName("winogrande", adapt=winogrande_row, adds=("answer",)),),
}

for _key, _own in NAMES.items():
    tfds_rows.add_name(*_key, *_own)
