"""Settings by leaf and expert against hand-computed values, and against mergekit where it is installed."""

import random

import numpy as np
import pytest

from elm_jax.errors import InputError
from elm_jax.merging.methods.parameter import Parameter
from elm_jax.merging.recipes import leaf_settings
from elm_jax.merging.recipes.depth import depth_of, layer_of
from elm_jax.merging.recipes.leaf_settings import resolve
from elm_jax.merging.recipes.recipe import MergeRecipe, Scope, parse_patterns
from elm_jax.merging.recipes.regions import Region

DENSITY = Parameter("density", default=1.0, low=0, high=1, per_expert=True)
SPECS = (DENSITY, Parameter("scale", default=1.0), Parameter("t", low=0, high=1),
         Parameter("normalize", "bool", default=True), Parameter("count", "int", default=3, low=1),
         Parameter("rescale", "choice", default="none", choices=("none", "l1")))
LEAF = "encoder/layers_1/mlp/wi_0/kernel"
RULES = [{"value": 1, "filter": "attention"}, {"value": [2, 4], "filter": "wi_0"}, {"value": 3}]


def at(setting, depth=0.0, kind="float", leaf=LEAF):
    return resolve(setting, leaf, depth, kind, "somewhere")


@pytest.mark.parametrize(("setting", "depth", "expected"), [
    (0.5, 0.3, 0.5),
    (-2, 0.3, -2.0),
    ("1e-3", 0.3, 0.001),
    ([0.25], 0.7, 0.25),
    ([0, 1], 0.0, 0.0),
    ([0, 1], 0.25, 0.25),
    ([0, 1], 1.0, 1.0),
    ([0, 1, 0.5], 0.25, 0.5),
    ([0, 1, 0.5], 0.5, 1.0),
    ([0, 1, 0.5], 0.75, 0.75),
    ([0, "1e1"], 0.5, 5.0),
    ({"value": 0.5, "filter": "mlp"}, 0.0, 0.5),
    ({"value": 0.5, "filter": "attention"}, 0.0, None),
    ({"value": [0, 4]}, 0.75, 3.0),
    (RULES, 0.5, 3.0),
    (RULES[::-1], 0.5, 3.0),
    ([{"value": 1, "filter": "*"}, {"value": 2, "filter": "wi_0"}], 0.0, 1.0),
    ([{"value": 1, "filter": "norm"}], 0.0, None),
])  # fmt: skip
def test_a_number(setting, depth, expected):
    value = at(setting, depth)
    assert value == expected and type(value) in (float, type(None))


@pytest.mark.parametrize(("setting", "kind", "depth", "expected"), [
    ([True, False], "bool", 0.99, True),
    ([True, False], "bool", 1.0, False),
    ([1, 0, 0], "bool", 0.49, True),
    ([1, 0, 0], "bool", 0.5, False),
    ("False", "bool", 0.0, False),
    (["none", "l1", "none"], "choice", 0.5, "l1"),
    (["none", "1e-3"], "choice", 1.0, "1e-3"),
    ([2, 4], "int", 0.5, 3),
])  # fmt: skip
def test_other_kinds(setting, kind, depth, expected):
    value = at(setting, depth, kind)
    assert value == expected and type(value) is type(expected)


LOOP: list = []
LOOP.append(LOOP)  # as YAML's &a [*a] reads


@pytest.mark.parametrize(("setting", "kind", "words"), [
    (True, "float", "somewhere.*True.*finite number"),
    ("much", "float", "'much'.*finite number"),
    (float("nan"), "float", "nan.*finite number"),
    ("inf", "float", "'inf'.*finite number"),
    (10**400, "float", "finite number"),
    ([0, "much"], "float", "'much'.*finite number"),
    (2, "bool", "got: 2.*true or false"),
    ("maybe", "bool", "'maybe'.*true or false"),
    (0.5, "int", "0.5.*whole number"),
    ([1, 2], "int", "1.5.*whole number"),
    (1, "choice", "got: 1.*a string"),
    (None, "float", "another form.*None"),
    ([], "float", "another form.*somewhere"),
    ([[1, 2]], "float", "both plain values and rules"),
    ([1, {"value": 1}], "float", "both plain values and rules.*got: 1"),
    (LOOP, "float", "both plain values and rules"),
    ({"filter": "wi"}, "float", "another form.*somewhere.value"),
    ({"value": 1, "filters": "wi"}, "float", "Unknown key of a rule 'filters'.*nearest: filter"),
    ({"value": 1, "filter": 3}, "float", "filter is a part of leaf names.*got: 3"),
    ({"value": 1, "filter": ""}, "float", "filter is a part of leaf names.*'\\*' for all"),
    ({"value": {"value": 1}}, "float", "another form.*somewhere.value"),
    ({"value": [{"value": 1}]}, "float", "cannot be nested"),
])  # fmt: skip
def test_settings_that_are_refused(setting, kind, words):
    with pytest.raises(InputError, match="(?s)" + words):
        at(setting, 0.5, kind)


def test_every_value_is_checked_even_where_no_leaf_matches():
    """A wrong rule behind one that always matches, and a wrong one for leaves that do not exist."""
    for wrong in ([{"value": 0.5}, {"value": 2.0, "filter": "norm"}], {"value": [0, 7], "filter": "nowhere"}):
        assert at(wrong) in (0.5, None)
        with pytest.raises(InputError, match=r"(?s)density is out of range.*at least 0 and at most 1"):
            leaf_settings.check_setting(wrong, DENSITY, "parameters.density")


def test_map_setting_keeps_the_form():
    changed = leaf_settings.map_setting([{"value": ["yes", False], "filter": "q"}, {"value": 1}], "bool",
                                        "here",
                                        lambda value: "l1" if value else "none")
    assert changed == [{"value": ["l1", "none"], "filter": "q"}, {"value": "l1"}]


def random_setting(rng, kind, rule=True):
    """A setting of up to four points or rules."""
    if kind == "float":
        value = lambda: rng.choice([rng.uniform(-2, 2), rng.randint(-3, 3), "1e-3", "-2.5"])  # noqa: E731
    else:
        value = lambda: rng.choice([True, False]) if kind == "bool" else rng.choice("abc")  # noqa: E731
    form = rng.choice(["plain", "gradient", "rule", "rules"] if rule else ["plain", "gradient"])
    if form == "plain":
        return value()
    if form == "gradient":
        return [value() for _ in range(rng.randint(1, 4))]
    filters = ["q", "norm", "*", None, "layers.1"]
    made = [{"value": random_setting(rng, kind, False), "filter": rng.choice(filters)}
            for _ in range(rng.randint(1, 3))]
    return made[0] if form == "rule" else made


@pytest.mark.parametrize("kind", ["float", "bool", "choice"])
def test_settings_as_mergekit_reads_them(kind):
    """The same value, to the last bit, for settings of all forms, leaves and depths."""
    config = pytest.importorskip("mergekit.config")
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter({"float": float, "bool": bool, "choice": str}[kind])
    form = pydantic.TypeAdapter(config.ParameterSetting)
    rng = random.Random(kind)
    seen = set()
    leaves = ("model.layers.1.self_attn.q_proj.weight", "model.layers.3.norm.weight", "lm_head.weight")
    for _ in range(400):
        setting = random_setting(rng, kind)
        theirs = form.validate_python(setting)
        for leaf in leaves:
            for depth in (0.0, 1 / 3, 0.5, 0.77, 1.0):
                expected = config.evaluate_setting(leaf, theirs, depth, validate=adapter.validate_python)
                value = at(setting, depth, kind, leaf)
                assert value == expected and type(value) is type(expected), (setting, leaf, depth)
                seen.add(value)
    assert None in seen and len(seen) >= {"float": 100, "bool": 3, "choice": 4}[kind]


@pytest.mark.parametrize(("leaf", "expected"), [
    ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12)),
    ("encoder.block.3.layer.0.SelfAttention.q.weight", ("encoder.block", 3)),
    ("decoder.block.3.layer.2.DenseReluDense.wi_0.weight", ("decoder.block", 3)),
    ("encoder/layers_3/attention/query/kernel", ("encoder.layers", 3)),
    ("target.decoder.layers_11.mlp.wi_0.kernel", ("target.decoder.layers", 11)),
    ("transformer.h.5.attn.c_attn.weight", ("transformer.h", 5)),
    ("h.5.ln_1.weight", ("h", 5)),
    ("gpt_neox.layers.3.attention.dense.bias", ("gpt_neox.layers", 3)),
    ("bert.encoder.layer.7.output.dense.weight", ("bert.encoder.layer", 7)),
    ("model.layers.3.block_sparse_moe.experts.2.w1.weight", ("model.layers", 3)),
    ("model.layers.3.mlp.experts.15.down_proj.weight", ("model.layers", 3)),
    ("shared.weight", None),
    ("lm_head.weight", None),
    ("encoder/relpos_bias/rel_embedding", None),
    ("decoder/layers/mlp/wi_0/kernel", None),
    ("adapters.wi_0.kernel", None),
    ("prompts.0", None),
    ("0.weight", None),
    ("model.layers.norm.weight", None),
    ("layers." + "9" * 5000 + ".weight", None),
    ("layers.٣.weight", None),
])  # fmt: skip
def test_layer_of(leaf, expected):
    assert layer_of(leaf) == expected


def test_depth_of():
    """Each stack has its own; a layer's experts and sub-layers lie where it does."""
    depths = depth_of([
        "shared.weight", "encoder.block.0.layer.0.q", "encoder.block.1.layer.1.wi",
        "encoder.block.3.layer.0.q", "encoder.final_layer_norm.weight", "decoder.block.0.layer.2.wo",
        "model.layers.1.experts.0.w1",
        "model.layers.1.experts.7.w1", "model.layers.4.experts.3.w1"])
    assert depths == {
        "shared.weight": 0.0, "encoder.block.0.layer.0.q": 0.0, "encoder.block.1.layer.1.wi": 1 / 3,
        "encoder.block.3.layer.0.q": 1.0, "encoder.final_layer_norm.weight": 0.0,
        "decoder.block.0.layer.2.wo": 1.0, "model.layers.1.experts.0.w1": 0.25,
        "model.layers.1.experts.7.w1": 0.25, "model.layers.4.experts.3.w1": 1.0}


def test_simple():
    parameters = {"density": (0.2, {"value": 0.4, "filter": "wi"}), "count": 4}
    recipe = MergeRecipe.simple("ties", [0.7, [0, 1]], parameters, specs=SPECS)
    plan = recipe.plan([LEAF, "encoder/layers_2/norm/scale"])
    assert {leaf.method for leaf in plan.values()} == {"ties"}
    assert [leaf.weights for leaf in plan.values()] == [(0.7, 0.5), (0.7, 1.0)]
    rest = {"scale": 1.0, "t": None, "normalize": True, "count": 4, "rescale": "none"}
    assert [leaf.parameters for leaf in plan.values()] == [
        {"density": (0.2, 0.4), **rest}, {"density": (0.2, 1.0), **rest}]


def test_simple_without_weights():
    recipe = MergeRecipe.simple("ties", parameters={"density": np.float32(0.5)}, experts=["a", "b"],
                                specs=SPECS)
    found = recipe.at(LEAF, 0.0)
    assert found.weights is None and found.parameters["density"] == (0.5, 0.5)
    assert type(found.parameters["density"][0]) is float
    with pytest.raises(InputError, match="needs experts"):
        MergeRecipe.simple("ties", parameters={"density": 0.5}, specs=SPECS)
    with pytest.raises(InputError, match=r"(?s)one value an expert.*density.*3 values.*expected: 2"):
        MergeRecipe.simple("ties", [1, 1], {"density": (1, 1, 1)}, experts=2, specs=SPECS)


def test_the_first_scope_that_says_something_counts():
    recipe = MergeRecipe("ties", ("a", "b"), (
        Scope({"density": [{"value": 0.1, "filter": "wi"}]}, expert=0),
        Scope({"density": [{"value": 0.2, "filter": "norm"}], "scale": 5}),
        Scope({"density": 0.3, "weight": 2, "scale": 6}),
    ), SPECS)  # fmt: skip
    assert recipe.at(LEAF, 0).parameters["density"] == (0.1, 0.3)
    assert recipe.at("norm", 0).parameters["density"] == (0.2, 0.2)
    assert recipe.at("lm_head", 0).parameters["density"] == (0.3, 0.3)
    assert recipe.at("lm_head", 0).weights == (2.0, 2.0) and recipe.at("norm", 0).parameters["scale"] == 5.0


@pytest.mark.parametrize(("scope", "words"), [
    (Scope({"densty": 1}, "here"), "Unknown parameter of ties 'densty'.*here.*nearest: density"),
    (Scope({"scale": 1}, "here", expert=0), "one for all experts.*here.scale"),
    (Scope({"density": [0.5, 1.5]}, "here"), r"out of range.*density\[1\].*1.5.*at least 0 and at most 1"),
    (Scope({"count": 0}, "here"), "out of range.*here.count.*got: 0.*at least 1"),
    (Scope({"rescale": "l2"}, "here"), "Unknown value of rescale 'l2'.*here.rescale.*l1"),
    (Scope({"weight": "heavy"}, "here", expert=1), "wrong type.*here.weight.*'heavy'"),
])  # fmt: skip
def test_scopes_that_are_refused(scope, words):
    with pytest.raises(InputError, match="(?s)" + words):
        MergeRecipe("ties", ("a", "b"), (scope,), SPECS)


def test_weights_for_some_experts_only():
    scope = Scope({"weight": {"value": 1, "filter": "wi"}}, expert=0)
    recipe = MergeRecipe("ties", ("a", "b"), (scope,), SPECS)
    assert recipe.at("norm", 0.0).weights is None
    with pytest.raises(InputError, match=f"(?s)no weight.*{LEAF}, b.*for every expert"):
        recipe.at(LEAF, 0.0)


def test_a_required_setting_that_no_rule_gives():
    scopes = (Scope({"weight": 1}, expert=0), Scope({"weight": {"value": 1, "filter": "wi"}}, expert=1))
    recipe = MergeRecipe("linear", ("a", "b"), scopes, required=("weight",))
    assert recipe.at(LEAF, 0.0).weights == (1.0, 1.0)
    with pytest.raises(InputError, match=r"(?s)linear needs a weight.*lm_head, b.*rule without a filter"):
        recipe.at("lm_head", 0.0)


def llama(layers):
    return ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.weight" for n in range(layers)),
            "model.norm.weight", "lm_head.weight"]


def sliced(*layers, module=None):
    """A recipe of one slice a range, each with a gradient of its own hundred."""
    regions = tuple(Region(module, pair) for pair in layers)
    return MergeRecipe("linear", ("a",), tuple(
        Scope({"weight": [100 * number, 100 * number + 10]}, region=region)
        for number, region in enumerate(regions, start=1)), regions=regions)


def test_gradients_run_over_their_own_slice():
    """The embedding is of the first slice, norm and head of the last; one layer alone lies at its end."""
    plan = sliced((0, 3), (3, 4)).plan(llama(4))
    assert [leaf.weights[0] for leaf in plan.values()] == [100, 100, 105, 110, 210, 200, 200]


@pytest.mark.parametrize(("recipe", "leaves", "words"), [
    (sliced((0, 3)), llama(4), "do not cover.*model.layers.*3 layers.*expected: 4"),
    (sliced((0, 4), (4, 8)), llama(4), "do not cover.*8 layers.*expected: 4"),
    (sliced((0, 2)), ["encoder.block.1.q.w", "decoder.block.1.q.w"],
     "one stack.*decoder.block, encoder.block"),
    (sliced((0, 2)), ["lm_head.weight"], "one stack.*none"),
    (sliced((0, 2), module="encoder"), ["encoder.block.1.q.w", "decoder.block.1.q.w"],
     "outside of all slices and modules.*decoder.block.1.*module encoder layers 0 to 1"),
    (sliced((0, 2), module="text"), llama(2), "module has no leaves.*module text"),
])  # fmt: skip
def test_slices_that_do_not_fit(recipe, leaves, words):
    with pytest.raises(InputError, match="(?s)" + words):
        recipe.plan(leaves)


def test_modules():
    leaves = ["encoder.block.0.q.w", "encoder.block.1.q.w", "decoder.block.0.q.w", "encoder.norm.w"]
    regions = (Region("encoder"), Region("decoder"))
    recipe = MergeRecipe("linear", ("a",), tuple(
        Scope({"weight": value}, region=region) for value, region in zip(([1, 3], 7), regions, strict=True)),
        regions=regions)  # fmt: skip
    assert [leaf.weights for leaf in recipe.plan(leaves).values()] == [(1,), (3,), (7,), (1,)]
    with pytest.raises(InputError, match=r"(?s)two settings.*shared.weight.*encoder.*1.0.*decoder.*7.0"):
        recipe.at("shared.weight", 0.0)
    with pytest.raises(InputError, match="outside of all"):
        recipe.at("vision.blocks.0.q.w", 0.0)


def test_the_head_is_of_the_module_shared():
    regions = (Region("encoder"), Region("shared"))
    recipe = MergeRecipe("linear", ("a",), (Scope({"weight": 1}, region=regions[0]),
                                       Scope({"weight": 2}, region=regions[1])), regions=regions)  # fmt: skip
    assert recipe.at("lm_head.weight", 0).weights == recipe.at("shared.weight", 0).weights == (2.0,)


def test_unmatched_filters():
    density = {"value": 1, "filter": "self_attn"}
    recipe = MergeRecipe.simple("ties", [RULES, 1], {"density": density}, specs=SPECS)
    assert sorted(recipe.unmatched_filters([LEAF])) == [
        "expert 1.weight: 'attention'", "parameters.density: 'self_attn'"]
    assert recipe.unmatched_filters([LEAF, "layers.0.self_attn.attention"]) == []


def test_patterns():
    """The first that matches counts, then the default; without one, the method's own."""
    weights = parse_patterns(["q=1,0", "SelfAttention= 0.7 , 3e-1"], [0.5, 0.5])
    recipe = MergeRecipe.simple("linear", weights)
    leaves = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "lm_head")
    assert [recipe.at(leaf, 0.0).weights for leaf in leaves] == [(1, 0), (0.7, 0.3), (0.5, 0.5)]
    bare = MergeRecipe.simple("linear", parse_patterns(["SelfAttention=0.7,0.3"]))
    assert [bare.at(leaf, 0.0).weights for leaf in leaves] == [(0.7, 0.3), (0.7, 0.3), None]
    assert parse_patterns([]) is None and parse_patterns(["a=b=2"])[0][0]["filter"] == "a=b"


@pytest.mark.parametrize(("texts", "default", "words"), [
    (["q"], None, "another form.*'q'.*norm=0.7,0.3"),
    (["=1,2"], None, "another form"),
    (["q="], None, "another form"),
    (["q=1,x"], None, "wrong type.*weights of 'q'.*'x'"),
    (["q=1,nan"], None, "wrong type.*'nan'"),
    (["q=1,"], None, "wrong type.*weights of 'q'.*''"),
    (["q=1,2", "k=1,2,3"], None, "one weight an expert.*weights of 'q'.*2 weights.*expected: 3"),
    (["q=1,2"], [1, 2, 3], "one weight an expert.*2 weights.*expected: 3"),
    (["q=1,2", "q=1,2"], None, "never count.*'q' matches"),
    (["Attention=1,2", "SelfAttention=1,2"], None, "never count.*SelfAttention.*longer pattern first"),
    (["*=1,2", "q=1,2"], None, "never count"),
])  # fmt: skip
def test_patterns_that_are_refused(texts, default, words):
    with pytest.raises(InputError, match="(?s)" + words):
        parse_patterns(texts, default)
