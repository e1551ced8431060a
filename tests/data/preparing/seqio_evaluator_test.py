"""SeqIO's own Evaluator and mixtures on our tasks: real rows, metrics and shares worked out apart from it."""

import math
import random
import string

import numpy as np
import pytest
import real_vocabularies as real
from rouge_score import rouge_scorer

seqio = pytest.importorskip("seqio")

import elm_jax.tasks  # noqa: E402, F401  (fills the registry)

from elm_jax.data.preparing import seqio_tasks  # noqa: E402
from elm_jax.data.registry import registry  # noqa: E402
from elm_jax.evaluation.metrics import TEXT_METRICS  # noqa: E402
from elm_jax.evaluation.rank import accuracy_of_scores  # noqa: E402
from elm_jax.vocabularies.vocabulary import ByteVocabulary  # noqa: E402

RANK, WRITE = "ag_news__classify", "xsum__doc_tldr"
BYTES = ByteVocabulary()
ROWS = 60
DRAWN = 1000


@pytest.fixture(autouse=True)
def data_and_vocabulary(monkeypatch):
    """In the environment: SeqIO's evaluator decodes in a thread of its own."""
    real.need_data()
    monkeypatch.setenv("ELM_DATA_DIR", str(real.DATA))
    monkeypatch.setenv("ELM_VOCABULARY", BYTES.file())


@pytest.fixture(scope="module")
def both():
    """A mixture of a task of each kind, with few rows each."""
    names = []
    for task in map(registry.get_task, (RANK, WRITE)):
        def rows(split, task=task):
            return list(task.read_rows(split))[:ROWS]

        names.append(registry.add_prompted_task(
            f"few {task.dataset}", task.config, task.load_template(), kind=task.kind, role="extra",
            rows=rows))
    registry.add_mixture("few_of_both", names)
    seqio_tasks.register(TEXT_METRICS)
    return names


def rendered(name):
    return [prompt for _, prompt in registry.get_task(name).render_rows("validation")]


def predictions(name):
    """A third right but for case and points, a third half right, a third empty; as text."""
    made = []
    for number, prompt in enumerate(rendered(name)):
        words = prompt.targets.split()
        made.append([f" {prompt.targets.upper()}! ", " ".join(words[: len(words) // 2]), ""][number % 3])
    return made


def predict_fn(texts):
    """As a model's: token ids in no order, padded, with text behind EOS that must not count."""
    def predict(data):
        numbers = [int(number) for number, _ in data.as_numpy_iterator()]
        assert len(numbers) == len(texts)
        random.Random(0).shuffle(numbers)
        ids = [[*BYTES.encode(text), 1, 70] for text in texts]
        longest = max(map(len, ids))
        return [(number, ids[number] + [0] * (longest - len(ids[number]))) for number in numbers]
    return predict


def by_hand_accuracy(name):
    def plain(text):
        return [word.strip(string.punctuation).lower() for word in text.split()]

    prompts = rendered(name)
    hits = sum(plain(prompt.targets) == plain(text)
               for prompt, text in zip(prompts, predictions(name), strict=True))
    return 100 * hits / len(prompts)


def by_hand_rouge(name):
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(prompt.targets.strip(), text.strip())["rougeL"].fmeasure
              for prompt, text in zip(rendered(name), predictions(name), strict=True)]
    return 100 * sum(scores) / len(scores)


def evaluate(name, **functions):
    evaluator = seqio.Evaluator(name, seqio.EncDecFeatureConverter(pack=False), "validation")
    metrics, _ = evaluator.evaluate(compute_metrics=True, **functions)
    return metrics.result()


def draw_scores(name):
    """A score for each choice of each row, and the accuracy in percent that they give."""
    draw, scores, hits = random.Random(1), [], 0
    prompts = rendered(name)
    for prompt in prompts:
        own = [draw.random() for _ in prompt.choices]
        hits += prompt.choices[own.index(max(own))] == prompt.targets
        scores += own
    return scores, 100 * hits / len(prompts)


def score_fn(scores):
    def score(data):
        numbers = [int(number) for number, _ in data.as_numpy_iterator()]
        assert len(numbers) == len(scores)
        return [(number, scores[number]) for number in reversed(numbers)]
    return score


def test_texts_of_a_rank_task_are_scored_by_accuracy(both):
    rank = both[0]
    found = evaluate(rank, predict_fn=predict_fn(predictions(rank)))
    assert found[rank]["accuracy"] == pytest.approx(by_hand_accuracy(rank))
    assert 30 < found[rank]["accuracy"] < 40


def test_texts_of_a_generation_task_are_scored_by_rouge(both):
    write = both[1]
    found = evaluate(write, predict_fn=predict_fn(predictions(write)))
    assert found[write]["rouge_l"] == pytest.approx(by_hand_rouge(write))
    assert 40 < found[write]["rouge_l"] < 70


def test_choices_of_a_rank_task_are_scored_by_rank(both):
    scores, expected = draw_scores(both[0])
    name = seqio_tasks.evaluation_name(both[0], accuracy_of_scores)
    found = evaluate(name, score_fn=score_fn(scores))[name]
    assert found["accuracy"] == pytest.approx(expected) and found["rows"] == ROWS
    assert 0 < expected < 60  # of four choices, at random


def test_a_mixture_is_evaluated_task_by_task(both):
    rank, write = both
    scores, expected = draw_scores(rank)
    name = seqio_tasks.evaluation_name("few_of_both", accuracy_of_scores)
    found = evaluate(name, predict_fn=predict_fn(predictions(write)), score_fn=score_fn(scores))
    assert set(found) == {f"{rank}_score_eval", write}
    assert found[f"{rank}_score_eval"]["accuracy"] == pytest.approx(expected)
    assert found[write]["rouge_l"] == pytest.approx(by_hand_rouge(write))


def shares_of(mixture, drawn=DRAWN):
    """How many of so many examples of a mixture came from each of its tasks, known by their texts."""
    made = {rendered.inputs: name for name in registry.get_mixture(mixture).tasks
            for _, rendered in registry.get_task(name).render_rows("train")}
    data = seqio.get_mixture_or_task(mixture).get_dataset(
        {"inputs": 8, "targets": 8}, split="train", shuffle=True, seed=3, num_epochs=None,
        copy_pretokenized=True, compute_stats_empirically=False)
    counts = dict.fromkeys(registry.get_mixture(mixture).tasks, 0)
    for row in data.take(drawn).as_numpy_iterator():
        counts[made[row["inputs_pretokenized"].decode()]] += 1
    return counts


@pytest.mark.parametrize(("cap", "t0_rates", "rates"), [
    # trec's two prompts share it, ropes' one has all its rows
    (1000, False, (500, 500, 771)),
    (3500, True, (3000, 3000, 771)),  # T0 leaves each prompt of a data set below its cap all rows
])
@pytest.mark.slow
def test_mixtures_draw_by_size_up_to_the_cap(cap, t0_rates, rates):
    tasks = ["trec__trec1", "trec__what_category_best_describe", "ropes__plain_no_background"]
    whole = f"drawn_{'t0_' if t0_rates else ''}{cap}"
    registry.add_mixture(whole, tasks)
    name = registry.capped_mixture(whole, cap, t0_rates=t0_rates)
    seqio_tasks.register(TEXT_METRICS)
    counts = shares_of(name)
    assert sum(counts.values()) == DRAWN
    for task, rate in zip(tasks, rates, strict=True):
        share = rate / sum(rates)
        bound = 4 * math.sqrt(share * (1 - share) / DRAWN)
        assert abs(counts[task] / DRAWN - share) < bound, (counts, rates)


def test_t0_s_cap_is_t0_s_rule():
    """What is no larger than 500,000 rows counts every row in every prompt, as in T0's own registry."""
    rates = registry.mixture_rates("t0_train_cap_500000")
    rows = {name: registry.get_task(name).num_rows("train") for name in rates}
    assert len(rates) > 100 and max(rows.values()) < 500_000 and rates == rows
    shared = registry.mixture_rates("t0_train_cap_10000")
    assert shared["cosmos_qa__no_prompt_text"] == pytest.approx(10_000 / 13)
    np.testing.assert_array_less([shared[name] - 1e-9 for name in rates], [rates[name] for name in rates])


@pytest.mark.parametrize("name", ["t0_unseen", "bbh", *(  # the others: many rows to count
    pytest.param(name, marks=pytest.mark.slow) for name in ("bigbench", "super_glue_rte"))])
def test_mixtures_without_a_train_split_can_be_read(name):
    """Their rates count the rows of the split that their tasks have."""
    seqio_tasks.register(TEXT_METRICS)
    rates = registry.mixture_rates(name)
    tasks = {task: registry.get_task(task) for task in registry.mixture_tasks(name)}
    assert rates == {task: float(len(facts.read_rows(facts.evaluation_split)))
                     for task, facts in tasks.items()}
    split = next(iter(tasks.values())).evaluation_split
    mixture = seqio.get_mixture_or_task(name)
    assert mixture.total_rate == sum(rates.values())
    if len(tasks) < 20:  # of many tasks SeqIO takes long to begin
        rows = mixture.get_dataset(None, split=split, num_epochs=1, shuffle=False).take(5)
        assert len(list(rows.as_numpy_iterator())) == 5
