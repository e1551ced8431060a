"""A folder of prepared arrays, ``<task>/<split>``: written whole, checked when read."""

import dataclasses
import errno
import os
import re
from collections.abc import Sequence

from etils import epath

from elm_jax.data.arrays import prepared_files
from elm_jax.data.arrays.prepared import PreparedSplit
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe, in_short
from elm_jax.runtime import hosts, leftovers, storage
from elm_jax.runtime.differences import differences
from elm_jax.vocabularies.vocabulary import Vocabulary

_OLDER = re.compile(r".+\.[0-9a-f]{8}\.partial")
"""Names of older versions for arrays that were being written."""


@dataclasses.dataclass(frozen=True)
class PreparedFolder:
    """A folder of prepared arrays in one vocabulary.

    Attributes:
        path: of the folder.
        vocabulary: that the arrays must be of.
    """

    path: epath.Path
    vocabulary: Vocabulary
    _checked: set[str] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def place_of(self, task: str, split: str, max_rows: int | None) -> epath.Path:
        """Path of the arrays of a split; each subset of its rows has its own folder."""
        for what, name in (("task", task), ("split", split)):  # a card, a file, may name them
            storage.require_name(name, self.path, f"name of a {what}")
        return self.path / task / (split if max_rows is None else f"{split}-{max_rows}")

    def has(self, task: str, split: str, max_rows: int | None) -> bool:
        """Whether the arrays of exactly this subset, or of the whole split, exist."""
        return any(storage.is_committed(self.place_of(task, split, rows)) for rows in {max_rows, None})

    def find(self, task: str, split: str, max_rows: int | None) -> PreparedSplit | None:
        """Opens the arrays of exactly this subset, or cuts it from those of the whole split.

        The first process of a run reads all contents once, and compares them with their digests; the others
        read what they need.

        Raises:
            InputError: they are of another vocabulary, of other rows, or of another template, or damaged.
        """
        for rows in dict.fromkeys((max_rows, None)):
            place = self.place_of(task, split, rows)
            if storage.is_committed(place):
                contents = hosts.is_first() and str(place) not in self._checked
                prepared = PreparedSplit.open(place, contents=contents)
                self._check_vocabulary(prepared, place)
                _check_source(prepared, place)
                if contents:
                    prepared_files.check_tokens(prepared.arrays["tokens"], self.vocabulary.size, place)
                    self._checked.add(str(place))
                return prepared if rows == max_rows else prepared.subset(max_rows)
        return None

    def write(self, prepared: PreparedSplit, task: str, split: str, max_rows: int | None) -> None:
        """Writes arrays, unless another process has written them meanwhile."""
        place = self.place_of(task, split, max_rows)
        if not storage.is_local(place):
            prepared.save(place)
            return
        # Written beside it first: workers of a farm may prepare the same split, and the last one would empty
        # the folder that others read already.
        leftovers.clear(str(place.parent), _OLDER)
        with storage.guard_writes(place), leftovers.new_folder(str(place)) as made:
            prepared.save(made)
            if place.exists() and not storage.is_committed(place):
                storage.remove(place)  # what an older version left half written
            try:
                os.rename(made, place)
                self._checked.add(str(place))  # what was written just now
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                # Another process was faster: its arrays are equal, and these are removed.

    def clear(self) -> None:
        """Removes what killed processes left of arrays that they had not finished."""
        if storage.is_local(self.path) and self.path.is_dir():
            for folder in self.path.iterdir():
                leftovers.clear(str(folder), _OLDER)

    def prepared_of(self, tasks: Sequence[str]) -> set[str]:
        """The given tasks that have arrays of any split."""
        folders = {task: self.path / task for task in tasks}
        return {task for task, folder in folders.items()
                if folder.exists() and any(storage.is_committed(split) for split in folder.iterdir()
                                           if not split.name.endswith(leftovers.PARTIAL))}

    def _check_vocabulary(self, prepared: PreparedSplit, place: epath.Path) -> None:
        found = prepared.info.get("vocabulary")
        if found != self.vocabulary.fingerprint:
            about, here = prepared.info.get("vocabulary_facts"), self.vocabulary.facts()
            unlike = "; ".join(differences(about, here)) if about else f"{in_short(here)} here"
            raise InputError(describe(
                "Prepared arrays were made with another vocabulary", where=place,
                got=f"{unlike or 'other pieces of the same number'} ({found})",
                expected=self.vocabulary.fingerprint,
                cure="prepare them again, or use the base that they were made for"))


def _check_source(prepared: PreparedSplit, place: epath.Path) -> None:
    """Refuses arrays of other rows or of another template, if the data exist here to compare.

    Arrays need no registry, so none is imported for this.
    """
    made_of, wanted = prepared.info.get("source"), source_now(prepared.name, prepared.split)
    if None not in (made_of, wanted) and wanted != made_of:
        task = registry.get_task(prepared.name)
        then, now = prepared.info.get("template_digest"), task.load_template().digest
        raise InputError(describe(
            f"Prepared arrays were made with cut_prompt={prepared.cut_prompt!r}, and now the task has "
            f"{task.cut_prompt!r}" if prepared.cut_prompt != task.cut_prompt
            else "Prepared arrays were made of other rows, or with another template" if then is None
            else "Prepared arrays were made of other rows" if then == now
            else f"Prepared arrays were made with another text of template {task.template!r}",
            where=place, got=f"{prepared.info.get('num_source', '?')} rows there, "
            f"{task.num_rows(prepared.split)} here; template {then} there, {now} here",
            cure="prepare into another folder, or remove this one (what was trained on it is out of "
            "date as well)"))


def source_now(name: str, split: str) -> str | None:
    """Hash of a split's rows and template as they are now; None where the task or its data are not here."""
    if name not in registry.task_names():
        return None
    task = registry.get_task(name)
    if not task.has_rows(split) or task.why_unavailable() is not None:
        return None
    return task.source_digest(split)
