"""Routers against float64 loops of their definitions, and properties that hold for every router."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from elm_jax.errors import InputError
from elm_jax.routing.cases import RoutedLibrary, RoutedTask, RouterSettings
from elm_jax.routing.evidence import NEVER, Evidence, centroids_of
from elm_jax.routing.fitted import FittedRouter
from elm_jax.routing.known_tasks import are_known
from elm_jax.routing.priors import Priors, priors_of_scores
from elm_jax.routing.router import ROUTERS, RouterStream, decide_rows, decide_task, default_router
from elm_jax.routing.vote import decide, decide_each
from tests.routing.index_test import make_index, unit_rows

WITHOUT_SCORING = [name for name, row in ROUTERS.items() if not row.needs_rows]
DATASETS, FAMILIES = ("a", "b", "c"), ("x", "x", "y")
FITTED = FittedRouter(("prior", "nearest", "centroid"), (1.0, 0.3, 0.0), ("x", "y"),
                      np.tile(np.eye(3), (3, 2, 1, 1)), np.tile([1.0, 0.3, 0.2], (3, 2, 1)), np.ones((3, 2)))


def library_of(seed: int, experts: int = 9) -> RoutedLibrary:
    rng = np.random.default_rng(seed)
    index = make_index({f"e{n}": unit_rows(rng, rng.integers(2, 7)) for n in range(experts)})
    return RoutedLibrary(index, Priors(rng.normal(size=(experts, 3)), DATASETS, FAMILIES), fitted=FITTED)


def task_of(seed: int, count: int = 12) -> RoutedTask:
    rng = np.random.default_rng(100 + seed)
    return RoutedTask(unit_rows(rng, count), unit_rows(rng, 1)[0], dataset="a", family="x")


def order(decision) -> list[str]:
    return [line.expert for line in decision.ranking]


def permuted(library: RoutedLibrary, places: np.ndarray) -> RoutedLibrary:
    index = library.index
    keys = {index.experts[e]: index.keys[index.owners == e] for e in places}
    priors = Priors(library.priors.generality[places], DATASETS, FAMILIES)
    return RoutedLibrary(make_index(keys), priors, fitted=library.fitted)


def plain_scores(name: str, library: RoutedLibrary, task: RoutedTask) -> list[float]:
    """What a router ranks by, by loops in float64; minus infinity for experts that it does not score."""
    keys, owners = library.index.keys.astype(np.float64), library.index.owners
    queries, experts = task.queries.astype(np.float64), range(len(library.index.experts))
    prior = [library.priors.generality[e, 2] for e in experts]  # c alone is of another family than a
    own = [[key for key, owner in zip(keys, owners, strict=True) if owner == e] for e in experts]
    nearest = [[max(query @ key for key in own[e]) for e in experts] for query in queries]
    votes = [sum(row.index(max(row)) == e for row in nearest) for e in experts]
    means = [sum(own[e]) / np.linalg.norm(sum(own[e])) for e in experts]
    near = [sum(query @ mean for query in queries) / len(queries) for mean in means]
    if name == "vote":
        return [vote / len(queries) if vote else -np.inf for vote in votes]
    if name == "centroid":
        return near
    if name == "prior":
        return prior
    if name.startswith("prior+"):
        text = task.text.astype(np.float64)
        keys_of_text = [max(text @ key for key in own[e]) for e in experts]
        parts = {"prior+nearest": (np.mean(nearest, axis=0), keys_of_text),
                 "prior+centroid": (near, [text @ mean for mean in means])}[name]
        match = sum((np.array(part) - np.mean(part)) / np.std(part) for part in parts)
        share = [sum(other <= one for other in match) / len(match) for one in match]
        return [p + RouterSettings().match_weight * np.log(s) for p, s in zip(prior, share, strict=True)]
    first = {e: next(q for q, row in enumerate(nearest) if row.index(max(row)) == e)
             for e in experts if votes[e]}
    mean = np.mean(nearest, axis=0)
    listed = sorted(experts, key=lambda e: (-votes[e], first.get(e, 0), 0 if votes[e] else -mean[e]))
    return [prior[e] if e in listed[:4] else -np.inf for e in experts]


def knows(library: RoutedLibrary, queries: np.ndarray) -> bool:
    """Whether queries are as near to the keys of the expert with most votes as those are to each other."""
    keys = [rows.astype(np.float64) for rows in library.index.by_expert().values()]
    nearest = [[max(query @ key for key in rows) for rows in keys] for query in queries.astype(np.float64)]
    winners = [row.index(max(row)) for row in nearest]
    best = max(dict.fromkeys(winners), key=winners.count)
    apart = [max(one @ other for b, other in enumerate(keys[best]) if b != a)
             for a, one in enumerate(keys[best])]
    margin = (1 - 0.8 / len(queries) ** 0.5) * np.std(apart)
    return np.mean([row[best] for row in nearest]) >= np.mean(apart) - margin


def test_a_known_task_is_left_to_votes():
    """Queries as near to an expert's keys as those to each other; of far ones the prior decides."""
    rng = np.random.default_rng(3)
    *middles, away = np.linalg.qr(rng.normal(size=(16, 16)))[0][:10]

    def near(middle: np.ndarray, count: int) -> np.ndarray:
        rows = middle + 0.1 * rng.normal(size=(count, 16))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    index = make_index({f"e{n}": near(middle, 40) for n, middle in enumerate(middles)})
    generality = np.zeros((9, 3))
    generality[7] = 3.0
    library = RoutedLibrary(index, Priors(generality, DATASETS, FAMILIES))
    for name in ("prior+nearest", "prior+centroid"):
        for home in range(9):
            known = decide_task(RoutedTask(near(middles[home], 32)), library, name)
            assert known.is_known and known.ranking[0].expert == f"e{home}"
            far = decide_task(RoutedTask(near(middles[home] + away, 32)), library, name)
            assert not far.is_known and far.ranking[0].expert == "e7"
    of_means = dataclasses.replace(library, of_means=True)  # means are nearer to each other than queries
    assert decide_task(RoutedTask(near(middles[0], 32)), of_means).is_known is None
    found = [(decide_task(RoutedTask(queries), library).is_known, knows(library, queries))
             for far in np.linspace(0, 0.4, 9) for count in (1, 9)
             for queries in [near(middles[2] + far * away, count)]]
    assert all(ours == plain for ours, plain in found) and len({ours for ours, _ in found}) == 2
    keys = index.keys[:40].astype(np.float64)
    nearest = (keys @ keys.T - 2 * np.eye(40)).max(axis=1)
    for count, margin in ((1, 0.2), (4, 0.6), (64, 0.9)):  # just within the margin, and just beyond
        for places in (-0.01, 0.01):
            mean = nearest.mean() - (margin + places) * nearest.std()
            sums = np.array([[count * mean, 0.0]])
            votes = np.array([[count, 0]])
            evidence = Evidence(np.array([count]), votes, np.array([[0, NEVER]]), sums, sums, sums)
            assert are_known(evidence, index).tolist() == [places < 0]
    few = make_index({f"e{n}": near(middle, 19) for n, middle in enumerate(middles)})
    library = RoutedLibrary(few, library.priors)  # too few keys to say how near they are to each other
    assert decide_task(RoutedTask(few.keys[:1]), library).is_known is False


@pytest.mark.parametrize(
    "name", ["vote", "centroid", "prior", "prior+nearest", "prior+centroid", "shortlist"])
@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_a_router_scores_what_plain_loops_score(name, backend):
    """The best comes first, and every expert has the score of the definition."""
    for seed in range(3):
        library, task = library_of(seed), task_of(seed)
        settings = RouterSettings(shortlist=4)
        decision = decide_task(task, library, name, settings=settings, backend=backend)
        plain = dict(zip(library.index.experts, plain_scores(name, library, task), strict=True))
        for line in decision.ranking:
            expected = plain[line.expert]
            assert line.score == (None if expected == -np.inf else pytest.approx(expected, abs=1e-5))
        assert [plain[line] for line in order(decision)] == sorted(plain.values(), reverse=True)


@pytest.mark.parametrize("name", WITHOUT_SCORING)
def test_order_of_experts_keys_and_queries_changes_nothing(name):
    """Without ties; the first won query decides among equal votes, so those queries keep their order."""
    library, task, rng = library_of(5), task_of(5, 40), np.random.default_rng(0)
    decision = decide_task(task, library, name)
    moved = permuted(library, rng.permutation(9))
    assert order(decide_task(task, moved, name)) == order(decision)
    votes = decide_task(task, library, "vote")
    if len({line.votes for line in votes.ranking if line.votes}) == sum(
            line.votes > 0 for line in votes.ranking) or name != "vote":
        mixed = dataclasses.replace(task, queries=task.queries[rng.permutation(40)])
        assert order(decide_task(mixed, library, name))[0] == order(decision)[0]


@pytest.mark.parametrize("name", WITHOUT_SCORING)
def test_copies_change_nothing(name):
    """They share the score of the oldest, and stand behind all experts that are no copies."""
    library, task = library_of(3), task_of(3)
    before = decide_task(task, library, name)
    index, generality = library.index, library.priors.generality
    for number, copied in ((0, 2), (1, 2), (2, 5)):
        index = index.add(f"copy{number}", index.keys[index.owners == copied])
        generality = np.concatenate([generality, generality[[copied]]])
    copied = RoutedLibrary(index, Priors(generality, DATASETS, FAMILIES), np.array([*range(9), 2, 2, 5]),
                           fitted=library.fitted)
    after = decide_task(task, copied, name)
    assert [(line.expert, line.votes) for line in after.ranking[:9]] == [
        (line.expert, line.votes) for line in before.ranking]
    for one, other in zip(after.ranking, before.ranking, strict=False):
        assert one.score == (None if other.score is None else pytest.approx(other.score, abs=1e-6))
    assert [(line.copy_of, line.votes) for line in after.ranking[9:]] == [
        (f"e{copied.copies[index.experts.index(line.expert)]}", 0) for line in after.ranking[9:]]
    np.testing.assert_array_equal(decide_rows(task, copied, name), decide_rows(task, library, name))


@pytest.mark.parametrize("name", WITHOUT_SCORING)
def test_rows_are_tasks_of_one_query_and_streams_are_tasks(name):
    """A row's expert is the first of a decision for it alone; a stream decides as for all queries at once."""
    library, task = library_of(7), task_of(7, 9)
    alone = [decide_task(dataclasses.replace(task, queries=task.queries[[n]]), library, name)
             for n in range(9)]
    picked = decide_rows(task, library, name)
    assert [library.index.experts[e] for e in picked] == [one.ranking[0].expert for one in alone]
    stream = RouterStream(library, name, text=task.text, dataset="a", family="x")
    decisions = [stream.update(part) for part in np.split(task.queries, [1, 3, 8])]
    assert decisions[0].num_queries == 1 and decisions[-1].num_queries == 9
    at_once = decide_task(task, library, name)
    assert order(decisions[-1]) == order(at_once)
    for one, other in zip(decisions[-1].ranking, at_once.ranking, strict=True):
        assert one.votes == other.votes and one.mean_similarity == pytest.approx(other.mean_similarity)


def test_votes_are_those_of_the_published_rule():
    library, task = library_of(1), task_of(1)
    ours, published = decide_task(task, library, "vote"), decide(task.queries, library.index)
    assert order(ours) == order(published)
    assert [line.votes for line in ours.ranking] == [line.votes for line in published.ranking]
    assert [library.index.experts[e] for e in decide_rows(task, library, "vote")] == decide_each(
        task.queries, library.index)


def test_a_library_without_priors_routes_by_votes_and_says_what_it_lacks():
    library, task = library_of(0), task_of(0)
    assert default_router(library) == "prior+nearest"
    old = RoutedLibrary(library.index)
    assert decide_task(task, old).router == "vote"
    with pytest.raises(InputError, match="elm library calibrate"):
        decide_task(task, old, "prior")
    with pytest.raises(InputError, match=r'nearest: (.*)shortlist|did you mean(.*)shortlist'):
        decide_task(task, library, "shortlits")


def test_a_text_stands_in_for_queries():
    """Q = 0: the prior and the text alone decide; routers by votes say that they need queries."""
    library = library_of(2)
    none = np.zeros((0, library.index.keys.shape[1]), np.float32)
    text = unit_rows(np.random.default_rng(0), 1)[0]
    with_text = decide_task(RoutedTask(none, text), library, "centroid")
    assert order(with_text) == order(decide_task(RoutedTask(text[None]), library, "centroid"))
    assert with_text.num_queries == 0 and not any(line.votes for line in with_text.ranking)
    nothing = RoutedTask(none)
    assert order(decide_task(nothing, library)) == order(decide_task(nothing, library, "prior"))
    with pytest.raises(InputError, match="needs queries"):
        decide_task(RoutedTask(none, text), library, "vote")
    with pytest.raises(InputError, match="queries or a text"):
        decide_task(RoutedTask(none), library, "centroid")


def test_priors_leave_out_the_target_and_rank_ties_in_the_middle():
    """Normal scores of mid-ranks, the mean over a data set's tasks, then over the data sets that count."""
    scores = np.array([[3, 1, 1, 0], [2, 1, 3, 0], [1, 5, 2, 0], [1, 5, 2, 0.0]])  # the last is a copy
    priors = priors_of_scores(scores, ["a", "a", "b", "c"], ["x", "x", "x", "y"], np.array([0, 1, 2, 2]))
    rank = {place: stats.norm.ppf((place - 0.5) / 3) for place in (1, 1.5, 2, 3)}
    expected = [[(rank[3] + rank[1.5]) / 2, rank[1], 0], [(rank[2] + rank[1.5]) / 2, rank[3], 0],
                [(rank[1] + rank[3]) / 2, rank[2], 0]]
    np.testing.assert_allclose(priors.generality, [*expected, expected[2]], atol=1e-12)
    np.testing.assert_allclose(priors.for_task("a", None), priors.generality[:, 1:].mean(axis=1))
    np.testing.assert_allclose(priors.for_task("a", "x"), priors.generality[:, 2])
    assert not Priors(priors.generality, priors.datasets, ("x",) * 3).for_task("a", "x").any()


def test_own_tasks_and_copies_do_not_count_in_ranks():
    """A plain loop: on a task those are ranked that neither saw its data set nor are copies of older ones."""
    rng = np.random.default_rng(0)
    scores, own = rng.integers(0, 6, (8, 9)) / 6, rng.random((8, 9)) < 0.3
    copies, datasets = np.array([0, 1, 2, 1, 4, 5, 2, 7]), [*"aabbbcdde"]
    own[[0, 1, 2, 4, 5], 8] = True  # the seventh alone is left
    scores[own | (copies != np.arange(8))[:, None]] = np.nan
    priors = priors_of_scores(scores, datasets, datasets, copies, own)
    for expert, oldest in enumerate(copies):
        for place, name in enumerate(priors.datasets):
            found = []
            for task in [task for task, dataset in enumerate(datasets) if dataset == name]:
                seen = {copies[e] for e in range(8) if own[e, task]}
                rivals = [scores[e, task] for e in sorted(set(copies.tolist())) if e not in seen]
                if oldest not in seen and len(rivals) > 1:
                    below, equal = (sum(map(compare, rivals)) for compare in (
                        scores[oldest, task].__gt__, scores[oldest, task].__eq__))
                    found.append(stats.norm.ppf((below + equal / 2) / len(rivals)))
            expected = np.mean(found) if found else np.nan
            np.testing.assert_allclose(priors.generality[expert, place], expected, atol=1e-12)
    assert np.isnan(priors.generality[:, 4]).all() and not np.isnan(priors.generality).all()
    scores[0, 0] = scores[1, 1] = np.nan
    with pytest.raises(InputError, match="scores missing"):
        priors_of_scores(scores, datasets, datasets, copies, own & False)


def test_centroids_are_means_and_k_means():
    """One is the mean; many of separate groups are the groups' means; few keys stand for themselves."""
    rng = np.random.default_rng(0)
    groups = [unit_rows(rng, 1) + 0.01 * rng.normal(size=(8, 8)).astype(np.float32) for _ in range(3)]
    keys = np.concatenate([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in groups])
    mean = keys.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(centroids_of(keys, 1), [mean / np.linalg.norm(mean)], atol=1e-6)
    found = centroids_of(keys, 3)
    assert ((found @ keys.T).max(axis=0) > 0.99).all()
    np.testing.assert_array_equal(centroids_of(keys[:2], 3), keys[:2])
    assert not centroids_of(0 * keys, 2).any()
