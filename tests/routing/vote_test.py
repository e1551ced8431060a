"""Voting against a plain re-implementation, and the known defects of the reference."""

import json
import logging

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.routing.index import KeyIndex
from elm_jax.routing.neighbors import ROWS, key_neighbors
from elm_jax.routing.ranking import Ranking, ranked_by_score
from elm_jax.routing.search import BEST, TIE
from elm_jax.routing.vote import decide, decide_each
from tests.routing.index_test import FakeEncoder, make_index, unit_rows

BACKENDS = sorted(BEST)


def plain_nearest(queries: np.ndarray, keys: np.ndarray) -> list[int]:
    """Position of the nearest key of each query, by loops, in float64."""
    result = []
    for query in queries.astype(np.float64):
        similarities = [sum(a * b for a, b in zip(query, key, strict=True))
                        for key in keys.astype(np.float64)]  # fmt: skip
        best = max(similarities)
        result.append(next(n for n, s in enumerate(similarities) if s >= best - TIE))
    return result


def plain_order(mean: np.ndarray, experts: list[int]) -> list[int]:
    """The rule for experts without votes, word by word."""
    left, order = list(experts), []
    while left:
        largest = max(mean[expert] for expert in left)
        order.append(next(expert for expert in left if mean[expert] >= largest - TIE))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("seed", range(3))
def test_experts_without_votes_are_ordered_by_the_rule_word_by_word(seed):
    rng = np.random.default_rng(seed)
    mean = rng.integers(0, 60, 80) * TIE * 0.4  # chains of ties that reach over several
    experts = np.flatnonzero(rng.random(80) < 0.8)
    assert ranked_by_score(mean, experts) == plain_order(mean, experts.tolist())


def test_a_ranking_is_looked_at_as_a_tuple_is_and_ordered_when_it_must_be():
    calls = []
    ranked = Ranking([3, 1], lambda: calls.append(1) or [3, 1, 0, 2], "e{}".format, 4)
    assert (ranked[0], ranked[:2], len(ranked), calls) == ("e3", ("e3", "e1"), 4, [])
    assert ranked[-1] == "e2" and ranked == ("e3", "e1", "e0", "e2") == tuple(ranked) and calls == [1]
    assert ranked[::2] == ("e3", "e0") and "e2" in ranked and ranked != ["e3", "e1", "e0", "e2"]
    with pytest.raises(IndexError):
        ranked[4]


def plain_decision(queries: np.ndarray, index: KeyIndex) -> list[tuple[str, int, float, float]]:
    """The definition of `decide` by loops, in float64."""
    queries, keys = queries.astype(np.float64), index.keys.astype(np.float64)
    winners = [int(index.owners[position]) for position in plain_nearest(queries, keys)]
    lines = []
    for expert, name in enumerate(index.experts):
        own = [key for key, owner in zip(keys, index.owners, strict=True) if owner == expert]
        best = [max(float(query @ key) for key in own) for query in queries]
        lines.append((name, winners.count(expert), max(best), sum(best) / len(best)))
    voted = [line for line in lines if line[1]]
    first = {name: winners.index(number) for number, name in enumerate(index.experts)
             if number in winners}  # fmt: skip
    voted.sort(key=lambda line: (-line[1], first[line[0]]))
    others = sorted((line for line in lines if not line[1]), key=lambda line: -line[3])
    return voted + others


def axis(number: int, dimension: int = 6) -> np.ndarray:
    return np.eye(dimension, dtype=np.float32)[[number]]


def names(decision) -> list[str]:
    return [line.expert for line in decision.ranking]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(4))
def test_decision_equals_plain_loops(backend, seed):
    rng = np.random.default_rng(seed)
    index = make_index({f"e{n}": unit_rows(rng, rng.integers(1, 7)) for n in range(9)})
    queries = unit_rows(rng, 12)
    decision = decide(queries, index, backend=backend)
    expected = plain_decision(queries, index)
    assert [(line.expert, line.votes) for line in decision.ranking] == [e[:2] for e in expected]
    np.testing.assert_allclose(
        [(line.best_similarity, line.mean_similarity) for line in decision.ranking],
        [e[2:] for e in expected], atol=1e-6,
    )  # fmt: skip
    assert sum(line.votes for line in decision.ranking) == decision.num_queries == 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_query_by_itself_gets_the_expert_that_it_votes_for_alone(backend):
    rng = np.random.default_rng(20)
    pool = unit_rows(rng, 12, 6)
    index = make_index({f"e{n}": pool[rng.integers(0, 12, 5)] for n in range(9)}).remove("e0")
    queries = np.concatenate([pool[:4], unit_rows(rng, 12, 6), np.zeros((1, 6), np.float32)])
    alone = [decide(query[None], index, backend=backend).top(1)[0] for query in queries]
    assert decide_each(queries, index, backend=backend) == alone and len(set(alone)) > 3
    with pytest.raises(InputError, match="at least one query"):
        decide_each(queries[:0], index)


def test_backends_decide_alike_with_duplicates_everywhere():
    rng = np.random.default_rng(10)
    pool = unit_rows(rng, 12, 384)
    index = make_index({f"e{n}": pool[rng.integers(0, 12, 20)] for n in range(30)})
    queries = pool[rng.integers(0, 12, 32)]
    one, other = (decide(queries, index, backend=backend).ranking for backend in BACKENDS)
    assert [(line.expert, line.votes) for line in one] == [(line.expert, line.votes) for line in other]
    for field in ("best_similarity", "mean_similarity"):
        values = [[getattr(line, field) for line in ranking] for ranking in (one, other)]
        np.testing.assert_allclose(*values, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_the_keys_of_an_expert_does_not_matter(backend):
    rng = np.random.default_rng(11)
    parts = {f"e{n}": unit_rows(rng, 20) for n in range(5)}
    parts["e1"][3] = parts["e1"][7]  # a duplicate inside one expert
    queries = unit_rows(rng, 16)
    before = decide(queries, make_index(parts), backend=backend)
    shuffled = {name: rng.permutation(keys) for name, keys in parts.items()}
    after = decide(queries, make_index(shuffled), backend=backend)
    assert [(line.expert, line.votes) for line in after.ranking] == [
        (line.expert, line.votes) for line in before.ranking
    ]


def test_order_of_the_experts_does_not_matter_without_ties():
    rng = np.random.default_rng(12)
    parts = {f"e{n}": unit_rows(rng, 8) for n in range(6)}
    queries = unit_rows(rng, 9)
    before = decide(queries, make_index(parts))
    after = decide(queries, make_index(dict(reversed(parts.items()))))
    assert names(before) == names(after)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_do_not_overwrite_each_other(backend):
    """The reference keys its votes by score: of three queries with one score, two get lost."""
    index = make_index({"a": axis(0), "b": axis(1)})
    queries = np.concatenate([axis(1), axis(0), axis(0), axis(0)])
    decision = decide(queries, index, backend=backend)
    assert [(line.expert, line.votes) for line in decision.ranking] == [("a", 3), ("b", 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_votes_go_to_the_expert_whose_first_query_comes_first(backend):
    index = make_index({"a": axis(0), "b": axis(1), "c": axis(2)})
    queries = np.concatenate([axis(2), axis(1), axis(0), axis(1), axis(2), axis(0)])
    assert names(decide(queries, index, backend=backend)) == ["c", "b", "a"]
    assert names(decide(queries[::-1], index, backend=backend)) == ["a", "c", "b"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_two_experts_share_counts_for_the_earlier_one(backend):
    index = make_index({"a": axis(3), "b": axis(0), "c": axis(0)})
    decision = decide(axis(0), index, backend=backend)
    assert [(line.expert, line.votes) for line in decision.ranking[:2]] == [("b", 1), ("c", 0)]
    # b and c have one mean similarity, so that the library's order decides between those left.
    index = make_index({"a": axis(3), "c": axis(0), "d": axis(0), "b": axis(1)})
    assert names(decide(axis(1), index, backend=backend)) == ["b", "a", "c", "d"]


def test_experts_without_votes_follow_by_mean_similarity():
    def at(cosine: float) -> np.ndarray:
        return (axis(0) * cosine + axis(1) * np.sqrt(1 - cosine**2)).astype(np.float32)

    parts = {"far": at(-0.5), "near": at(0.9), "same": axis(0), "middle": at(0.3)}
    parts["equal"] = at(0.3 + 3e-6)  # above the middle by rounding alone
    decision = decide(np.repeat(axis(0), 4, axis=0), make_index(parts))
    assert names(decision) == ["same", "near", "middle", "equal", "far"]
    assert [line.votes for line in decision.ranking] == [4, 0, 0, 0, 0]
    np.testing.assert_allclose(
        [line.mean_similarity for line in decision.ranking], [1, 0.9, 0.3, 0.3, -0.5], atol=1e-5
    )


def test_fewer_rows_than_queries_and_nothing_leaks_into_the_next_task():
    rng = np.random.default_rng(13)
    index = make_index({f"e{n}": unit_rows(rng, 5) for n in range(4)})
    queries = unit_rows(rng, 32)
    alone = decide(queries, index)
    short = decide(queries[:2], index)
    assert short.num_queries == 2 and sum(line.votes for line in short.ranking) == 2
    assert decide(queries, index) == alone


def test_few_votes_never_lower_k():
    index = make_index({name: axis(number) for number, name in enumerate("abcde")})
    decision = decide(np.repeat(axis(2), 8, axis=0), index)
    assert decision.top(3) == ["c", "a", "b"] and len(decision.top(5)) == 5
    for count in (0, 6):
        with pytest.raises(InputError, match="1 to 5 experts"):
            decision.top(count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_of_zeros_does_not_vote(backend, caplog):
    index = make_index({"a": axis(0), "b": axis(1)})
    queries = np.concatenate([np.zeros((3, 6), np.float32), axis(1)])
    with caplog.at_level(logging.WARNING):
        decision = decide(queries, index, backend=backend)
    assert [(line.expert, line.votes) for line in decision.ranking] == [("b", 1), ("a", 0)]
    assert decision.num_queries == 4 and "3 of 4 queries" in caplog.text


def test_to_dict_is_json_with_the_whole_ranking():
    index = make_index({"a": axis(0), "b": axis(1)})
    facts = json.loads(json.dumps(decide(axis(1), index).to_dict()))
    assert facts == {
        "num_queries": 1, "text_format": "instance", "encoder": "fake", "router": "vote",
        "ranking": [
            {"expert": "b", "votes": 1, "best_similarity": 1.0, "mean_similarity": 1.0},
            {"expert": "a", "votes": 0, "best_similarity": 0.0, "mean_similarity": 0.0},
        ],
    }  # fmt: skip


def test_bad_queries_are_refused():
    index = make_index({"a": axis(0)})
    for queries, message in (
        (axis(0, 5), r"float32\[1, 5\][\s\S]*float32\[n, 6\]"),
        (axis(0)[:0], "at least one query"),
        (3 * axis(0), "queries, row 0"),
    ):
        with pytest.raises(InputError, match=message):
            decide(queries, index)
    with pytest.raises(InputError, match="Unknown routing backend 'jaxx'"):
        decide(axis(0), index, backend="jaxx")
    with pytest.raises(InputError, match="no keys"):
        decide(axis(0), KeyIndex.empty(FakeEncoder(dimension=6), "instance"))


def test_the_tie_band_is_wider_than_rounding_and_narrower_than_meaning():
    rng = np.random.default_rng(14)
    queries, keys = unit_rows(rng, 64, 384), unit_rows(rng, 256, 384)
    error = np.abs(queries @ keys.T - queries.astype(np.float64) @ keys.T.astype(np.float64)).max()
    assert 5 * error < TIE < 1e-4


@pytest.mark.parametrize("rows", [5, ROWS])
def test_keys_without_themselves_are_routed_as_queries_are(rows, monkeypatch):
    monkeypatch.setattr("elm_jax.routing.neighbors.ROWS", rows)
    rng = np.random.default_rng(2)
    own = {name: unit_rows(rng, count, 4) for name, count in (("a", 7), ("b", 1), ("c", 6))}
    own["c"][:3] = own["a"][:3]  # ties, which the earlier expert wins
    own["a"][6] = 0  # a key that is near to nothing
    index = make_index(own)
    found = key_neighbors(index)
    for expert, (name, keys) in enumerate(own.items()):
        given = []
        for place, key in enumerate(keys):
            rest = {**own, name: np.delete(keys, place, axis=0)}
            left = make_index({other: some for other, some in rest.items() if len(some)})
            given += [decide_each(key[None], left)[0]] if key.any() else []
        np.testing.assert_allclose(found.shares[expert], [given.count(other) / len(keys) for other in own])
    both = [(keys.astype(np.float64) @ own["c"].T.astype(np.float64)).max(1).mean() for keys in own.values()]
    np.testing.assert_allclose(found.similarity[:2, 2], both[:2], atol=1e-6)
    assert np.isnan(found.similarity[1, 1]) and found.similarity[2, 2] < 1
    assert [pair[:2] for pair in found.nearest_pairs(1)] == [(0, 2)]
