"""Merges in mergekit's schema: what they mean, which mergekit's own planner confirms, and what is refused."""

import textwrap

import pytest

from elm_jax.errors import InputError
from elm_jax.merging.recipes import mergekit_yaml, strict_yaml
from elm_jax.merging.recipes.depth import depth_of
from elm_jax.merging.recipes.mergekit_yaml import read_config

LINEAR = """
    merge_method: linear
    models:
      - {model: a, parameters: {weight: 1}}
      - {model: b, parameters: {weight: 2}}
    """


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a config from its text; its messages name the file merge.yaml."""
    monkeypatch.chdir(tmp_path)

    def read_text(text):
        (tmp_path / "merge.yaml").write_text(textwrap.dedent(text))
        return read_config("merge.yaml")

    return read_text


def test_a_plain_merge(read):
    config = read(LINEAR + "dtype: bfloat16\n    out_dtype: torch.float32\n")
    assert (config.method, config.models, config.base) == ("linear", ("a", "b"), None)
    assert (config.dtype, config.out_dtype) == ("bfloat16", "float32")
    assert config.donor == config.tokenizer == "a"
    assert config.notes == () and config.source == "merge.yaml" and "merge_method" in config.source_text
    found = config.recipe.at("lm_head", 0.0)
    assert (found.method, found.weights, found.parameters) == ("linear", (1.0, 2.0), {"normalize": True})


def task_vectors(method, parameters=""):
    return f"""
    merge_method: {method}
    base_model: base
    models:
      - model: base
      - {{model: a, parameters: {{weight: 1, density: 0.5}}}}
      - {{model: b, parameters: {{weight: -1e-1}}}}
    parameters: {{{parameters}}}
    """


@pytest.mark.parametrize(("method", "parameters", "expected"), [
    ("ties", "", {"density": (0.5, 1.0), "normalize": True, "rescale": "none", "scale": 1.0}),
    ("dare_ties", "", {"density": (0.5, 1.0), "normalize": False, "rescale": "l1", "scale": 1.0}),
    ("dare_linear", "", {"density": (0.5, 1.0), "normalize": False, "rescale": "l1", "scale": 1.0}),
    ("task_arithmetic", "", {"normalize": False, "scale": 1.0}),
    ("ties", "lambda: 1e-1, normalize: false, rescale: true, density: 0.2",
     {"density": (0.5, 0.2), "normalize": False, "rescale": "l1", "scale": 0.1}),
])  # fmt: skip
def test_task_vectors(read, method, parameters, expected):
    config = read(task_vectors(method, parameters))
    assert (config.method, config.models, config.base, config.donor) == (method, ("a", "b"), "base", "base")
    found = config.recipe.at("lm_head", 0.0)
    assert found.weights == (1.0, -0.1) and found.parameters == expected


def test_slerp_puts_the_base_first(read):
    config = read("""
        merge_method: slerp
        base_model: b
        models: [{model: a}, {model: b}]
        parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}
        """)
    assert (config.models, config.base, config.donor) == (("b", "a"), None, "b")
    found = [config.recipe.at(leaf, 0.25) for leaf in ("layers.1.mlp.w", "lm_head")]
    assert [leaf.parameters for leaf in found] == [{"t": 0.25}, {"t": 0.5}]
    assert found[0].weights is None


def test_notes_name_what_has_no_effect(read):
    config = read("""
        merge_method: task_arithmetic
        base_model: base
        models:
          - {model: base, parameters: {weight: 3}}
          - {model: a, parameters: {weight: 1, density: 0.5}}
        parameters: {int8_mask: true, rescale: {value: false, filter: norm}}
        """)
    assert [note.split(":")[0] for note in config.notes] == [
        "models[0].parameters", "models[1].parameters.density", "parameters.int8_mask", "parameters.rescale"]
    assert config.recipe.at("lm_head", 0.0).parameters == {"normalize": False, "scale": 1.0}


def test_ways_to_name_a_folder(read):
    """Only plain names are split at signs."""
    config = read("""
        merge_method: linear
        models: [{model: {model: {path: a+b@c}}}, {model: {path: /some/where}}, {model: {model: org/x}}]
        parameters: {weight: 1}
        tokenizer_source: /some/where
        """)
    assert config.models == ("a+b@c", "/some/where", "org/x")
    assert (config.donor, config.tokenizer) == ("a+b@c", "/some/where")


@pytest.mark.parametrize(("change", "words"), [
    # The file.
    ("merge_method: ties\nmerge_method: linear\n", "line 2.*'merge_method' is written twice"),
    ("models: [a, b\n", "not valid YAML.*merge.yaml.*line 2"),
    ("models: &x [*x]\nmerge_method: linear", "mapping is missing.*models"),
    ("a: &x {b: 1}\n<<: *x\n", "Unknown key of a merge 'b'"),
    ("<<: {b: 1}\n<<: {c: 1}\n", "line 2.*'<<' is written twice"),
    ("<<: [1]\n", "not valid YAML.*line 1"),
    (LINEAR + "parameters: {<<: {weigth: 1}}", "Unknown parameter of linear 'weigth'"),
    ("? [a]\n: b", "key is no plain word"),
    ("- linear", "another form.*a mapping"),
    ("", "another form.*None"),
    ("a: 1\n---\nb: 2", "not valid YAML.*another document"),
    ("a: !!python/object/apply:os.getcwd []", "not valid YAML.*python"),
    ("a: 2020-99-99", "not valid YAML"),
    ("a: " + "[" * 3000, "not valid YAML"),
    ("dtype: a\0b", "not valid YAML"),
    # The method.
    ("models: [{model: a}]", "needs a method.*merge_method.*got: nothing.*linear | slerp"),
    ("merge_method: tiess\nmodels: [{model: a}]", "Unknown merge_method 'tiess'.*nearest: ties"),
    ("merge_method: passthrough\nmodels: [{model: a}]", "Unknown merge_method 'passthrough'"),
    ("merge_methods: ties", "Unknown key of a merge 'merge_methods'.*nearest: merge_method"),
    (LINEAR + "dtype: int64", "Unknown dtype 'int64'.*merge.yaml: dtype"),
    (LINEAR + "out_dtype: 16", "dtype is a name.*out_dtype.*got: 16"),
    # Vocabularies.
    (LINEAR + "tokenizer_source: union", "union of vocabularies.*tokenizer_source.*never resized"),
    (LINEAR + "tokenizer_source: elsewhere", "Unknown model 'elsewhere'.*tokenizer_source"),
    (LINEAR + "tokenizer: {}", "union of vocabularies.*tokenizer.source.*never resized"),
    (LINEAR + "tokenizer: {source: union}", "union of vocabularies.*tokenizer.source.*never resized"),
    (LINEAR + "tokenizer: {source: elsewhere}", "Unknown model 'elsewhere'.*tokenizer.source"),
    (LINEAR + "tokenizer: {source: base, tokens: {x: {source: a}}}", "tokenizer.tokens is not supported"),
    (LINEAR + "tokenizer: {source: base, pad_to_multiple_of: 64}", "pad_to_multiple_of.*never resized"),
    (LINEAR + "tokenizer: base", "mapping is missing.*tokenizer"),
    (LINEAR + "tokenizer: {source: base}\n    tokenizer_source: base", "tokenizer is named twice"),
    (LINEAR + "chat_template: auto", "chat_template is not supported"),
    # Models.
    ("merge_method: linear", "names its inputs in one way.*got: nothing.*models:, slices: or modules:"),
    (LINEAR + "slices: []", "names its inputs in one way.*models and slices"),
    ("merge_method: linear\nmodels: []", "list is missing.*models"),
    ("merge_method: linear\nmodels: {model: a}", "list is missing.*models"),
    ("merge_method: linear\nmodels: [a]", r"mapping is missing.*models\[0\]"),
    ("merge_method: linear\nmodels: [{modle: a}]", r"Unknown key of a model 'modle'.*models\[0\].*model"),
    ("merge_method: linear\nmodels: [{model: a, layer_range: [0, 1]}]", "key of a model 'layer_range'"),
    ("merge_method: linear\nmodels: [{model: 3}]", r"named by its folder.*models\[0\].model.*got: 3"),
    ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", r"named by its folder.*models\[0\].model"),
    ("merge_method: linear\nmodels: [{model: a+lora}]", "adapter.*model: {model: {path: 'a.lora'}}"),
    ("merge_method: linear\nmodels: [{model: a@main}]", "revision.*a@main"),
    ("merge_method: linear\nmodels: [{model: {path: a, revision: main}}]", r"revision.*\[0\].model.revision"),
    ("merge_method: linear\nmodels: [{model: {model: a, lora: b}}]", r"lora.*models\[0\].model.lora"),
    ("merge_method: linear\nmodels: [{model: {model: a, path: b}}]", "named by its folder"),
    ("merge_method: linear\nmodels: [{model: {}}]", "named by its folder"),
    ("merge_method: linear\nmodels: [{model: a}, {model: a}]\nparameters: {weight: 1}", "twice.*got: a"),
    ("merge_method: linear\nmodels: [{model: a}, {model: ./a}]\nparameters: {weight: 1}",
     "in two ways.*./a and a"),
    ("merge_method: ties\nmodels: [{model: a}]\nparameters: {weight: 1}", "ties needs a base.*base_model"),
    ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]\nparameters: {weight: 1}", "no model to merge"),
    ("merge_method: slerp\nmodels: [{model: a}, {model: b}]\nparameters: {t: 1}",
     "two models.*base_model None"),
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]\nparameters: {t: 1}",
     "two models.*models b, c, a; base_model a"),
    # Parameters.
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
     r"needs a weight of b.*models\[1\].parameters.weight.*no default.*beside merge_method"),
    ("merge_method: linear\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1}}]",
     "needs a weight of c.*: parameters.weight"),
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]",
     "needs a t.*parameters.t.*write it"),
    (LINEAR + "parameters: {weigth: 1}", "Unknown parameter of linear 'weigth'.*: parameters.*weight"),
    (LINEAR + "parameters: {density: 1}", "Unknown parameter of linear 'density'"),
    (LINEAR + "parameters: {1: 1}", "Unknown parameter of linear '1'"),
    (LINEAR + "parameters: [1]", "mapping is missing.*parameters"),
    (LINEAR + "parameters: {normalize: maybe}", "wrong type.*parameters.normalize.*'maybe'.*true or false"),
    (LINEAR + "parameters: {weight: .nan}", "wrong type.*parameters.weight.*nan.*finite"),
    (LINEAR + "parameters: {weight: true}", "wrong type.*parameters.weight.*True"),
    (LINEAR + "parameters: {weight: null}", "another form.*parameters.weight.*None"),
    (LINEAR + "parameters: {weight: [{value: 1, fliter: q}]}", "Unknown key of a rule 'fliter'.*weight.0"),
    (LINEAR + "parameters: {weight: &x [*x]}", "both plain values and rules"),
    (task_vectors("ties", "density: 1.5"), "density is out of range.*: parameters.density.*1.5.*at most 1"),
    (task_vectors("ties", "lambda: {value: [1, x]}"), r"wrong type.*parameters.lambda.value\[1\].*'x'"),
    (task_vectors("ties", "rescale: 2"), "wrong type.*parameters.rescale.*true or false"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]",
     r"one for all models.*models\[0\].parameters.normalize.*beside merge_method"),
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: a, parameters: {t: 1}}, {model: b}]",
     "one for all models.*parameters.t"),
])  # fmt: skip
def test_configs_that_are_refused(read, change, words):
    with pytest.raises(InputError, match=r"(?s)" + words):
        read(change)


def slices(*parts, method="linear", head="parameters: {weight: 1}"):
    lines = "".join(f"  - {part}\n" for part in parts)
    return f"merge_method: {method}\n{head}\nslices:\n{lines}"


def source(model, first, stop, extra=""):
    return f"{{model: {model}, layer_range: [{first}, {stop}]{extra}}}"


@pytest.mark.parametrize(("text", "words"), [
    (slices("{}"), r"list is missing.*slices\[0\].sources"),
    (slices("{source: []}"), r"Unknown key of a slice 'source'.*nearest: sources"),
    (slices("{sources: [{model: a}]}"), r"range of layers.*slices\[0\].sources\[0\].layer_range"),
    (slices("{sources: [{model: a, layer_range: [0, 2.0]}]}"), "range of layers.*first layer"),
    (slices(f"{{sources: [{source('a', 2, 2)}]}}"), "range of layers"),
    (slices(f"{{sources: [{source('a', 0, 4)}, {source('b', 4, 8)}]}}"),
     r"Other layers of another model.*sources\[1\].layer_range.*\[4, 8\].*\[0, 4\]"),
    (slices(f"{{sources: [{source('a', 0, 4)}]}}", f"{{sources: [{source('a', 2, 6)}]}}"),
     r"move, repeat or leave out.*slices\[1\].*\[2, 6\].*from layer 4.*models:"),
    (slices(f"{{sources: [{source('a', 1, 4)}]}}"), "move, repeat or leave out.*from layer 0"),
    (slices(f"{{sources: [{source('a', 0, 4)}], residual_weight: 0.5}}"), "residual_weight is not supported"),
    (slices(f"{{sources: [{source('a', 0, 4)}]}}", f"{{sources: [{source('b', 4, 6)}]}}"),
     r"must merge the same models.*slices\[1\].*got: b.*expected: a"),
    (slices(f"{{sources: [{source('a', 0, 4)}, {source('b', 0, 4)}], base_model: a}}",
            f"{{sources: [{source('a', 4, 6)}, {source('b', 4, 6)}], base_model: b}}", method="ties"),
     "unlike bases.*none and a and b"),
    ("merge_method: linear\nmodules: {}", "Modules have another form.*got: nothing"),
    ("merge_method: linear\nmodules: {default: {models: [{model: a}]}, x: {models: [{model: a}]}}",
     "Modules have another form.*default, x"),
    ("merge_method: linear\nmodules: {x: {}}", "module names its inputs in one way.*modules.x"),
    ("merge_method: linear\nmodules: {x: {model: []}}", "Unknown key of a module 'model'.*modules.x"),
    ("merge_method: linear\nmodules: {x: {models: [{model: a}], parameters: {weigth: 1}}}",
     "Unknown parameter of linear 'weigth'.*modules.x.parameters"),
])  # fmt: skip
def test_slices_and_modules_that_are_refused(read, text, words):
    with pytest.raises(InputError, match=r"(?s)" + words):
        read(text)


def test_files_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"nowhere.yaml"):
        read_config(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError):
        read_config(tmp_path)
    (tmp_path / "merge.yaml").write_bytes(b"dtype: \xff")
    with pytest.raises(InputError, match=r"(?s)not valid YAML.*merge.yaml.*UTF-8"):
        read_config(tmp_path / "merge.yaml")
    monkeypatch.setattr(mergekit_yaml, "LARGEST_FILE", 5)
    with pytest.raises(InputError, match=r"(?s)too large.*8 bytes.*at most 5"):
        read_config(tmp_path / "merge.yaml")


def test_merge_keys_of_merge_keys_stay_small(tmp_path):
    """Each brings all keys of the one before nine times: written out, they would be 9^30."""
    lines = ["k0: &k0 {a: 1, b: 2}"]
    lines += [f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}], c{n}: 1}}" for n in range(1, 30)]
    (tmp_path / "merge.yaml").write_text("\n".join([*lines, "x: {<<: *k29, a: 3}"]))
    value, _ = strict_yaml.read_yaml(tmp_path / "merge.yaml", "config", 1 << 20, known=["k1", "k29"])
    assert value == {"k1": {"a": 1, "b": 2, "c1": 1}, "k29": {**value["k29"]}, "x": {**value["k29"], "a": 3}}
    assert len(value["k29"]) == 31


def test_messages_stay_short(tmp_path):
    """Aliases make a short file stand for a huge value, which no message may spell out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "merge.yaml").write_text("\n".join(lines).replace("a29", "models"))
    value, _ = strict_yaml.read_yaml(tmp_path / "merge.yaml", "config", 1 << 20)
    (tmp_path / "merge.yaml").write_text("\n".join(lines) + "\nmerge_method: linear")
    with pytest.raises(InputError, match="Unknown key of a merge 'a0'"):
        read_config(tmp_path / "merge.yaml")
    with pytest.raises(InputError) as caught:
        strict_yaml.YamlFile("merge.yaml").mapping(value["models"], "models")
    assert len(str(caught.value)) < 500


# Against mergekit's own planner.

RULES = "[{filter: q_proj, value: [0.1, 0.9, 0.3]}, {filter: SelfAttention, value: 0.4}, {value: 0.7}]"
ON_LLAMA = {
    "linear": """
        merge_method: linear
        models:
          - {model: a, parameters: {weight: [0, 1e-1, 0.7]}}
          - {model: b}
        parameters: {weight: %(rules)s, normalize: [true, false]}
        """,
    "linear with a base that is not listed": """
        merge_method: linear
        base_model: c
        models: [{model: a, parameters: {weight: 2}}, {model: b}]
        parameters: {weight: 1}
        """,
    "ties": """
        merge_method: ties
        base_model: a
        models:
          - {model: c, parameters: {weight: %(rules)s, density: {filter: norm, value: 0.2}}}
          - {model: b, parameters: {weight: [1, -1]}}
        parameters: {density: %(rules)s, lambda: [0.5, 1.5], rescale: [{filter: mlp, value: [true, false]}]}
        """,
    "ties with a listed base": """
        merge_method: ties
        base_model: b
        models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}},
                 {model: c, parameters: {weight: 2, density: 0.5}}]
        parameters: {normalize: false, int8_mask: true}
        """,
    "dare_ties": """
        merge_method: dare_ties
        base_model: a
        models: [{model: b}, {model: c}]
        parameters: {weight: 0.5, density: [0.2, 0.8], normalize: {filter: mlp, value: true}}
        """,
    "dare_linear": """
        merge_method: dare_linear
        base_model: a
        models: [{model: b}, {model: c}]
        parameters: {weight: 0.5, rescale: [{filter: norm, value: false}]}
        """,
    "task_arithmetic": """
        merge_method: task_arithmetic
        base_model: a
        models: [{model: b, parameters: {weight: {filter: "*", value: [0, 1]}}}, {model: c}]
        parameters: {weight: 0.25, lambda: 2, density: 0.5}
        """,
    "slerp": """
        merge_method: slerp
        base_model: b
        models: [{model: a}, {model: b}]
        parameters: {t: %(rules)s}
        """,
    "slerp by slices": """
        merge_method: slerp
        base_model: a
        slices:
          - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
        parameters: {t: [0, 0.5, 0.3, 0.7, 1]}
        """,
    "linear by slices with a base that is not listed": """
        merge_method: linear
        base_model: c
        slices:
          - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
        parameters: {weight: [1, 2]}
        """,
    "several slices": """
        merge_method: ties
        slices:
          - base_model: a
            sources:
              - {model: a, layer_range: [0, 3]}
              - {model: b, layer_range: [0, 3], parameters: {weight: [0, 1], density: 0.1}}
              - {model: c, layer_range: [0, 3]}
            parameters: {weight: [3, 4], lambda: 2}
          - base_model: a
            sources:
              - {model: c, layer_range: [3, 4], parameters: {weight: {filter: mlp, value: [5, 6]}}}
              - {model: b, layer_range: [3, 4], parameters: {density: [0.3, 0.4]}}
              - {model: a, layer_range: [3, 4]}
        parameters: {weight: [7, 8], density: [0.5, 0.6]}
        """,
    "merge keys": """
        weights: &weights {weight: [0, 1], normalize: true}
        merge_method: linear
        models:
          - &first {model: a, parameters: &own {weight: %(rules)s}}
          - {<<: *first, model: b}
          - {model: c, parameters: {<<: *own, weight: 0.25}}
        parameters: {normalize: false, <<: [*weights, {weight: 3}]}
        tokenizer: {source: base}
        """,
    "the whole module": """
        merge_method: linear
        modules:
          default:
            models: [{model: a, parameters: {weight: [0, 1]}}, {model: b}]
            parameters: {weight: 2}
        parameters: {weight: 3, normalize: false}
        """,
}
ON_T5 = {
    "ties": """
        merge_method: ties
        base_model: t5-a
        models: [{model: t5-b, parameters: {weight: [0, 1], density: %(rules)s}}, {model: t5-c}]
        parameters: {weight: 0.5, lambda: [1, 2, 4]}
        """,
    "modules": """
        merge_method: linear
        modules:
          encoder:
            slices:
              - sources: [{model: t5-a, layer_range: [0, 2]}, {model: t5-b, layer_range: [0, 2]}]
                parameters: {weight: [1, 2]}
              - sources: [{model: t5-b, layer_range: [2, 3], parameters: {weight: %(rules)s}},
                          {model: t5-a, layer_range: [2, 3]}]
            parameters: {weight: 9}
          decoder:
            models: [{model: t5-a, parameters: {weight: [0, 8]}}, {model: t5-b}]
            parameters: {weight: {filter: DenseReluDense, value: 6}}
          shared:
            models: [{model: t5-a, parameters: {weight: 5}}, {model: t5-b}]
        parameters: {weight: 4}
        """,
}


@pytest.fixture(scope="module")
def mergekit():
    """What the planner needs, as a namespace; heavy, so once."""
    config = pytest.importorskip("mergekit.config")
    from mergekit import architecture, options, plan

    class Peer:
        @staticmethod
        def planned(value):
            """(parameters, parameters by model) by tensor name, as mergekit would merge it."""
            parsed = config.MergeConfiguration.model_validate(value)
            choices = options.MergeOptions(quiet=True)
            planner = plan.MergePlanner(
                parsed, architecture.get_architecture_info(parsed, choices), choices,
                parsed.referenced_models()[0].config())
            planner._plan()  # its public ways build tasks that need its own version of pydantic
            return {weight.name: (dict(task.parameters), {
                str(model): dict(values) for model, values in task.input_parameters.items()})
                for weight, task in planner._tensors}

    return Peer


@pytest.fixture(scope="module")
def folders(tmp_path_factory, mergekit):
    """A folder with a, b and c, Llama-shaped of 4 layers, and t5-a to t5-c, of 3 and 2."""
    transformers = pytest.importorskip("transformers")
    where = tmp_path_factory.mktemp("models")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
        tie_word_embeddings=False))
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=8, d_model=4, d_kv=2, d_ff=8, num_layers=3, num_decoder_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    for name in "abc":
        llama.save_pretrained(where / name)
        t5.save_pretrained(where / f"t5-{name}")
    return where


@pytest.mark.parametrize(("model", "name"), [
    *(("a", name) for name in ON_LLAMA), *(("t5-a", name) for name in ON_T5)])
def test_settings_are_mergekits(folders, mergekit, monkeypatch, model, name):
    """Each tensor gets the weights and parameters, to the last bit, with which mergekit would merge it."""
    import yaml
    from safetensors import safe_open

    monkeypatch.chdir(folders)
    text = {"a": ON_LLAMA, "t5-a": ON_T5}[model][name] % {"rules": RULES}
    (folders / "merge.yaml").write_text(textwrap.dedent(text))
    config = read_config("merge.yaml")
    with safe_open(f"{model}/model.safetensors", "np") as file:
        leaves = list(file.keys())
    ours = config.recipe.plan(leaves)
    theirs = mergekit.planned(yaml.safe_load(text))
    assert set(leaves) == set(theirs) and len(leaves) > 30
    for leaf, (shared, each) in theirs.items():
        assert set(each) == {*config.models, *filter(None, [config.base])}
        found = ours[leaf]
        expected = [each[model].get("weight") for model in config.models]
        assert list(found.weights or [None] * len(expected)) == expected, leaf
        for parameter, value in found.parameters.items():
            if parameter == "density":
                assert list(value) == [each[model]["density"] for model in config.models], leaf
            elif parameter == "rescale":
                assert value == ("l1" if shared["rescale"] else "none"), leaf
            else:
                assert value == shared["lambda" if parameter == "scale" else parameter], leaf
        unread = set(shared) - set(found.parameters) - {"lambda", "int8_mask"}
        assert unread <= ({"rescale"} if name == "task_arithmetic" else set())


def test_depths_are_mergekits(folders, mergekit, monkeypatch):
    """A gradient from 0 to 1 shows the depth at which mergekit sees a tensor."""
    monkeypatch.chdir(folders)
    for model, some in (("a", {0, 1 / 3, 2 / 3, 1}), ("t5-a", {0, 0.5, 1})):
        theirs = mergekit.planned({
            "merge_method": "linear", "models": [{"model": model}], "parameters": {"weight": [0, 1]}})
        expected = {leaf: each[model]["weight"] for leaf, (_, each) in theirs.items()}
        assert depth_of(expected) == expected and set(expected.values()) == some
