"""What a study merges after routing: one expert a set, whatever the order in which decisions name it."""

from elm_jax.workflows.study.study_routing import merged_id, merged_sets


def test_a_set_is_merged_once_in_the_order_of_the_first_decision_for_it():
    picks = {"one": ["b", "a"], "two": ["a", "c"], "three": ["a", "b"], "four": ["c", "a"]}
    sets = merged_sets({"decisions": {task: {"top_k": members} for task, members in picks.items()}})
    assert list(sets.values()) == [["b", "a"], ["a", "c"]]
    assert list(sets) == [merged_id(["a", "b"]), merged_id(["c", "a"])]
