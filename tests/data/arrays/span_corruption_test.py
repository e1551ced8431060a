"""Pretraining objectives by their properties, and that pretraining reads raw passages only."""

import collections
import itertools
import math
import os

import elm_jax.tasks
import numpy as np
import pytest
from checkout import ROOT
from elm_jax.tasks import embedded, passages
from elm_jax.tasks.embedded import datasets as embedded_datasets

from elm_jax.data.arrays import span_corruption
from elm_jax.data.arrays.span_corruption import PretrainingSource
from elm_jax.data.registry import registry
from elm_jax.data.sources import row_files
from elm_jax.errors import InputError
from elm_jax.vocabularies.vocabulary import EXTRA_IDS, train_vocabulary

VOCAB = 400
SENTINELS = np.arange(VOCAB - 1, VOCAB - 1 - EXTRA_IDS, -1)
EOS = 1
REGISTRIES = (elm_jax.tasks, embedded)  # importing them fills the registry


class Letters:
    """A vocabulary of one id a character."""

    size = VOCAB
    extra_ids = EXTRA_IDS
    eos_id = EOS

    def sentinel_id(self, number: int) -> int:
        return VOCAB - 1 - number

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def source(share, *, length=40, seed=0, count=50):
    texts = [chr(65 + number % 50) * 7 + "abcdefghijklmnopqrstuvwxyz" * 2 for number in range(count)]
    return PretrainingSource.from_texts(texts, Letters(), chunk_length=length, prefix_lm_share=share,
                                        seed=seed)


def undo(inputs, targets, vocab_size):
    """The tokens from which span corruption made inputs and targets; written from its definition."""
    assert inputs[-1] == EOS and targets[-1] == EOS
    spans, current = {}, None
    for token in targets[:-1]:
        if token >= vocab_size - EXTRA_IDS:
            current = spans.setdefault(int(token), [])
        else:
            current.append(int(token))
    original = []
    for token in inputs[:-1]:
        original += spans.pop(int(token), None) or [int(token)]
    assert not spans
    return original


@pytest.mark.parametrize("length", [2, 3, 7, 8, 20, 41, 128, 513, span_corruption.MAX_CHUNK])
def test_span_corruption_can_be_undone(length):
    rng = np.random.default_rng(length)
    for _ in range(10):
        chunk = rng.integers(3, VOCAB - EXTRA_IDS, length).astype(np.int32)
        mask = span_corruption.noise_mask(length, rng)
        inputs, targets = span_corruption.span_corruption(chunk, mask, SENTINELS, EOS)
        assert inputs.dtype == targets.dtype == np.int32
        assert undo(inputs, targets, VOCAB) == chunk.tolist()
        sentinels = [token for token in inputs if token >= VOCAB - EXTRA_IDS]
        assert sentinels == [VOCAB - 1 - number for number in range(len(sentinels))]
        assert sentinels == [token for token in targets if token >= VOCAB - EXTRA_IDS]
        assert len(inputs) + len(targets) == length + 2 * len(sentinels) + 2


def test_span_corruption_of_the_papers_example():
    # Raffel et al. 2020, figure 2: Thank you <X> me to your party <Y> week, <X> for inviting <Y> last
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    mask = np.isin(words, ["for", "inviting", "last"])
    chunk = np.arange(10, 20)
    inputs, targets = span_corruption.span_corruption(chunk, mask, SENTINELS, EOS)
    assert inputs.tolist() == [10, 11, 399, 14, 15, 16, 17, 398, 19, EOS]
    assert targets.tolist() == [399, 12, 13, 398, 18, EOS]


@pytest.mark.parametrize("length", [8, 20, 100, 512])
def test_noise_has_the_density_and_spans_of_t5(length):
    rng = np.random.default_rng(0)
    noise = max(round(0.15 * length), 1)
    spans = max(round(noise / 3), 1)
    for _ in range(50):
        mask = span_corruption.noise_mask(length, rng)
        starts = mask & ~np.concatenate([[False], mask[:-1]])
        assert mask.shape == (length,) and mask.dtype == bool
        assert (mask.sum(), starts.sum()) == (noise, spans)
        assert not mask[0] and mask[-1]
    if length == 512:
        assert abs(noise / length - 0.15) < 0.001 and abs(noise / spans - 3) < 0.1


def test_noise_density_and_span_length_over_many_examples():
    found = source(0.0, length=59, count=400)
    hidden = spans = total = 0
    for index in range(len(found)):
        _, targets = found.example(index)
        marks = sum(token >= VOCAB - EXTRA_IDS for token in targets)
        hidden += len(targets) - 1 - marks
        spans += marks
        total += len(found.chunks[index])
    assert hidden / total == pytest.approx(0.15, abs=0.01)
    assert hidden / spans == pytest.approx(3.0, abs=0.2)


def test_all_ways_to_cut_noise_into_spans_are_equally_likely():
    # 20 tokens, density 0.3, mean 2: 6 noise tokens in 3 spans have C(5, 2) = 10 compositions.
    rng = np.random.default_rng(0)
    draws = 4000
    noise, kept = collections.Counter(), collections.Counter()
    for _ in range(draws):
        mask = span_corruption.noise_mask(20, rng, density=0.3, mean_span=2.0)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
        noise[tuple(np.diff(edges)[::2])] += 1
        kept[edges[0]] += 1
    assert len(noise) == math.comb(5, 2)
    expected = draws / len(noise)
    chi_square = sum((count - expected) ** 2 / expected for count in noise.values())
    assert chi_square < 27.9  # 9 degrees of freedom: one in a thousand
    # The first kept run has length k in C(13 - k, 1) of the C(13, 2) compositions of 14 in 3.
    for length, count in kept.items():
        assert count / draws == pytest.approx((13 - length) / math.comb(13, 2), abs=0.03)


def test_prefix_and_target_make_up_the_passage_and_cuts_are_uniform():
    chunk = np.arange(10, 20)
    rng = np.random.default_rng(0)
    cuts = collections.Counter()
    for _ in range(1800):
        inputs, targets = span_corruption.prefix_lm(chunk, rng, EOS)
        assert inputs[-1] == targets[-1] == EOS
        assert np.concatenate([inputs[:-1], targets[:-1]]).tolist() == chunk.tolist()
        cuts[len(inputs) - 1] += 1
    assert set(cuts) == set(range(1, 10))
    assert all(abs(count - 200) < 60 for count in cuts.values())


def test_an_example_depends_on_seed_epoch_and_index_alone():
    first, second = source(0.5), source(0.5)
    order = np.random.default_rng(1).permutation(len(first))
    early = {int(index): first.example(int(index), 3) for index in order}
    for index in range(len(second)):
        for ours, theirs in zip(early[index], second.example(index, 3), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def targets(found, epoch):
        return [found.example(index, epoch)[1].tolist() for index in range(len(found))]

    base = targets(first, 0)
    for other in (targets(first, 1), targets(source(0.5, seed=1), 0)):
        same = sum(ours == theirs for ours, theirs in zip(base, other, strict=True))
        assert same < len(base) / 4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_each_objective_gets_its_share_in_every_epoch(share):
    found = source(share, count=500)
    for epoch in (0, 1):
        prefix = sum(found.example(index, epoch)[1][0] < VOCAB - EXTRA_IDS for index in range(len(found)))
        assert prefix / len(found) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


def test_chunks_cover_each_passage_and_never_span_two():
    texts = ["a" * 45, "b" * 20, "c" * 7, "d" * 28]
    found = PretrainingSource.from_texts(texts, Letters(), chunk_length=20, prefix_lm_share=0.5, seed=0)
    assert ["".join(map(chr, chunk)) for chunk in found.chunks] == [
        "a" * 20, "a" * 20, "b" * 20, "d" * 20, "d" * 8]  # a's last 5 and c's 7 tokens are too few


def test_a_trained_vocabulary_serves(tmp_path):
    texts = embedded.passages()[:500]
    vocabulary = train_vocabulary(texts, tmp_path / "v.model", 400, seed=0)
    found = PretrainingSource.from_texts(texts, vocabulary, chunk_length=64, prefix_lm_share=0.0, seed=0)
    for index in range(20):
        inputs, targets = found.example(index)
        assert targets[0] == vocabulary.sentinel_id(0)
        original = undo(inputs, targets, vocabulary.size)
        assert original == found.chunks[index].tolist()
    assert found.chunks[0].tolist() == vocabulary.encode(texts[0])[:64]


@pytest.mark.parametrize(("changes", "message"), [
    ({"chunk_length": 7}, "chunk_length.*8 to 2000"), ({"chunk_length": 2001}, "chunk_length.*2001"),
    ({"prefix_lm_share": 1.5}, "prefix_lm_share.*0 to 1"),
])
def test_settings_out_of_range_are_refused(changes, message):
    settings = {"chunk_length": 40, "prefix_lm_share": 0.5, "seed": 0} | changes
    with pytest.raises(InputError, match=f"(?s){message}"):
        PretrainingSource.from_texts(["a" * 50], Letters(), **settings)


def test_too_little_text_is_refused():
    with pytest.raises(InputError, match="long enough"):
        PretrainingSource.from_texts(["a" * 7, ""], Letters(), chunk_length=40, prefix_lm_share=0.5,
                                     seed=0)


LONG = "the quick brown fox jumps over the lazy dog while two old cats sleep on"


@pytest.mark.parametrize(("passage", "forbidden", "found"), [
    (f"Yesterday: {LONG} the roof.", LONG, True),
    (LONG.upper().replace(" ", " \n "), f"Q: {LONG}?", True),          # case and white space
    (LONG.replace("fox", "fox,"), LONG, True),                        # punctuation
    (LONG.replace("dog", "hen"), LONG, False),                        # runs of 8 and 6 words are left
    ("Yes.", "yes", True),                                            # a short text is the passage
    ("He said yes to the plan.", "yes", False),                       # or merely stands in it
    ("Łódź lies in Poland", "łódź LIES in Poland!", True),
    ("Łódź lies in Poland", "Žódź lies in Poland", False),
    ("", "", False),
])
def test_check_overlap(passage, forbidden, found):
    result = span_corruption.check_overlap(["something else", passage], [forbidden])
    assert set(result) == ({1} if found else set())


def test_check_overlap_names_the_shared_run_and_takes_its_length():
    text = LONG.replace("dog", "hen")
    assert span_corruption.check_overlap([text], [LONG], words=8)[0] == (
        "the quick brown fox jumps over the lazy")
    assert not span_corruption.check_overlap([text], [LONG], words=9)


def leaves(value):
    """All strings in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)


def test_embedded_passages_hold_no_row_prompt_or_answer():
    found = embedded.passages()
    tables = (*embedded_datasets.TRAIN, *embedded_datasets.UNSEEN)
    held = [text for name in tables for split in embedded_datasets.NUM_ROWS
            if split == "validation" or name in embedded_datasets.UNSEEN
            for row in embedded_datasets.rows(name, split) for text in leaves(row)]
    assert len(held) > 7500  # more than a text a row
    assert span_corruption.check_overlap(found, held) == {}
    written = [text for name in (*embedded.TRAIN_TASKS, *embedded.UNSEEN_TASKS)
               for split in registry.get_task(name).splits
               for _, row in registry.get_task(name).render_rows(split)
               for text in (row.inputs, row.targets)]
    whole = "\n".join(" ".join(text.split()).casefold() for text in found)
    # Answers of a few words, such as a weekday, stand in any text; longer ones must not.
    assert not [text for text in set(written)
                if len(text.split()) > 5 and " ".join(text.split()).casefold() in whole]


RAW_FIELDS = {"text", "context", "content", "dialogue", "document", "sentence1", "background",
              "situation", "support"}
"""Fields that hold text as it was found; no question, choice, answer, summary or explanation."""


@pytest.fixture
def real_passages(monkeypatch):
    folder = os.environ.get(
        row_files.DATA_DIR_VARIABLE, str(ROOT.parent / "shared" / "data"))
    if not os.path.isdir(folder):
        pytest.skip(f"no data folder: {row_files.DATA_DIR_VARIABLE} is not set, and {folder} is absent")
    monkeypatch.setenv(row_files.DATA_DIR_VARIABLE, folder)
    found = {field: list(row_files.read_passages(field.dataset, field.config, field.fields))
             for field in passages.PASSAGES
             if row_files.find_file(field.dataset, field.config, "train") is not None}
    if not found:
        pytest.skip(f"no data set of the passages table lies in {folder}")
    return found


def available(*roles):
    """(dataset, config, splits) of the tasks of these roles that have rows of their own."""
    tasks = [registry.get_task(name) for role in roles
             for name in registry.task_names(role=role, available_only=True)]
    return {(task.dataset, task.config, task.splits) for task in tasks
            if task.rows is None and task.own_files is None and task.source is None}


def test_real_passages_are_of_training_data_sets_only(real_passages):
    train = {(dataset, config) for dataset, config, _ in available("train")}
    held = {(dataset, config) for dataset, config, _ in available("unseen", "generative", "bigbench")}
    used = {(field.dataset, field.config) for field in real_passages}
    assert used <= train and not used & held
    for field in passages.PASSAGES:
        assert set(field.fields) <= RAW_FIELDS, field


@pytest.mark.slow  # reads the real data whole
def test_real_passages_hold_no_row_of_an_unseen_data_set(real_passages):
    texts = [text for found in real_passages.values() for text in found]
    held = [text for dataset, config, splits in sorted(available("unseen", "generative", "bigbench"), key=str)
            for split in splits for row in row_files.read_rows(dataset, config, split)
            for text in leaves(row)]
    assert len(texts) > 1000 and len(held) > 1000
    # Two Wikipedia abstracts of one form share a run of 12 words; of one row, far longer ones.
    overlap = span_corruption.check_overlap(texts, held, words=20)
    assert {number: texts[number] for number in overlap} == {}


@pytest.mark.slow  # reads the real data whole
def test_real_passages_are_no_prompt_and_no_answer(real_passages):
    for field, texts in real_passages.items():
        rows = row_files.read_rows(field.dataset, field.config, "train")
        others = [text for row in rows for name in row if name not in field.fields
                  for text in leaves(row[name])]
        overlap = span_corruption.check_overlap(texts, others, words=20)
        # Both sentences of a pair (mrpc) are raw text, and may share much of it.
        assert len(overlap) / len(texts) < (0.1 if field.config == "mrpc" else 0.01), field
        whole = {" ".join(text.split()) for text in texts}
        for name in registry.mixture_tasks(field.name):
            rendered = itertools.islice(registry.get_task(name).render_rows("train"), 100)
            inputs = {" ".join(row.inputs.split()) for _, row in rendered}
            assert not whole & inputs, name
