"""Hugging Face folders in and out: bits, configs, logits and texts against transformers itself."""

import json

import hf_folders
import jax
import numpy as np
import pytest
import real_vocabularies as real
import safetensors.torch
import torch
import transformers
from t5_rows import rows

from elm_jax.errors import InputError, RunError
from elm_jax.experts.base import load_base, load_vocabulary
from elm_jax.formats.elm import elm_folders
from elm_jax.formats.hf import t5_models
from elm_jax.formats.tensors import safetensors_files, torch_files
from elm_jax.models.decode import greedy
from elm_jax.models.t5.network import T5Network, shift_right
from elm_jax.runtime import storage, trees
from elm_jax.vocabularies import hf_tokenizer
from elm_jax.workflows.merge import merge_inputs

FAMILIES = sorted(hf_folders.PUBLISHED)
logits_of = jax.jit(lambda network, params, batch: network.logits(params, batch), static_argnums=0)


def there_and_back(source, tmp_path, **save):
    """hf -> elm -> hf."""
    elm_folders.write_elm(tmp_path / "elm", t5_models.open_hf(source))
    t5_models.write_hf(tmp_path / "back", elm_folders.open_elm(tmp_path / "elm"), **save)
    return tmp_path / "back"


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_keeps_every_bit_and_the_config(family, tmp_path):
    model = hf_folders.build(family, torch.bfloat16 if family in ("t0", "mt5") else torch.float32)
    hf_folders.publish(model, family, tmp_path / "source", shard_size="30KB")
    settings = tmp_path / "source" / "generation_config.json"
    assert not any("greedy" in note for note in t5_models.open_hf(tmp_path / "source").notes)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_beams": 4, "top_k": 9,
                                    "eos_token_id": [1, 7]}))
    note, = (note for note in t5_models.open_hf(tmp_path / "source").notes if "greedy" in note)
    assert note.endswith("does not apply: num_beams = 4, eos_token_id = [1, 7]")
    back = there_and_back(tmp_path / "source", tmp_path, max_shard_bytes=30_000)
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "source"), hf_folders.stored(back))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((back / file).read_text()) == json.loads((tmp_path / "source" / file).read_text())
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(hf_folders.stored(back))
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(f).values())
             for f in back.glob("*.safetensors")]
    assert len(sizes) > 2 and sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= max(30_000, max(t.nbytes for t in hf_folders.stored(back).values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_texts_are_those_of_transformers(family, tmp_path):
    model = hf_folders.build(family, seed=1)
    hf_folders.publish(model, family, tmp_path / "source")
    base = load_base(tmp_path / "source")
    back = type(model).from_pretrained(
        there_and_back(tmp_path / "source", tmp_path), dtype=torch.float32).eval()
    network = T5Network(base.config)
    draw = np.random.default_rng(0)
    inputs, targets = (hf_folders.tokens(draw, 50, length, 320) for length in (10, 7))
    batch = {"encoder_input_tokens": inputs, "decoder_input_tokens": np.asarray(shift_right(targets))}
    ours = np.asarray(logits_of(network, base.params, batch))
    texts = np.asarray(greedy(network, base.params, rows(inputs), max_length=8))
    feed = {"input_ids": torch.tensor(inputs, dtype=torch.long),
            "attention_mask": torch.tensor(inputs > 0).long()}
    with torch.no_grad():
        for peer in (model, back):
            theirs = peer(**feed, decoder_input_ids=torch.tensor(batch["decoder_input_tokens"]).long())
            assert np.abs(ours - theirs.logits.numpy()).max() < 1e-4
        # transformers 5.23 sizes the cache after the encoder's layers, so a deeper decoder needs none.
        generated = back.generate(**feed, max_new_tokens=8, do_sample=False, use_cache=False).numpy()
    theirs = np.pad(generated[:, 1:], ((0, 0), (0, 9 - generated.shape[1])))
    np.testing.assert_array_equal(texts, theirs)
    assert len({tuple(row) for row in texts}) > 10, "the texts must differ for the comparison to say much"


def byt5_folder(folder, how):
    """A ByT5: no vocabulary, only words on which class reads bytes."""
    hf_folders.publish(hf_folders.build("byt5"), "byt5", folder)
    if how == "saved":
        transformers.ByT5Tokenizer().save_pretrained(folder)
    elif how == "named":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return folder


@pytest.mark.parametrize("how", ["saved", "named", "only in config.json"])
def test_a_tokenizer_of_bytes_becomes_a_vocabulary_and_a_tokenizer_again(how, tmp_path):
    back = there_and_back(byt5_folder(tmp_path / "source", how), tmp_path)
    wanted = transformers.ByT5Tokenizer()
    again = transformers.AutoTokenizer.from_pretrained(back)
    assert isinstance(again, transformers.ByT5Tokenizer) and len(again) == len(wanted)
    base = load_base(tmp_path / "elm")
    assert base.vocabulary_path == str(tmp_path / "elm" / "vocabulary.json")
    assert base.vocabulary.size == base.config.vocab_size == 384
    for text in ("Zwölf Boxkämpfer 字 😀", "", "two  spaces\n"):
        ids = wanted(text).input_ids
        assert again(text).input_ids == ids == [*base.vocabulary.encode(text), 1]
        assert base.vocabulary.decode(ids) == text
    assert again("<extra_id_3>").input_ids == wanted("<extra_id_3>").input_ids
    assert load_base(back).vocabulary.fingerprint == base.vocabulary.fingerprint
    assert load_base(tmp_path / "source").vocabulary.fingerprint == base.vocabulary.fingerprint


def test_a_tokenizer_of_bytes_with_other_extra_ids(tmp_path):
    folder = byt5_folder(tmp_path / "source", "named")
    transformers.ByT5Tokenizer(extra_ids=120).save_pretrained(folder)
    back = there_and_back(folder, tmp_path)
    assert len(transformers.AutoTokenizer.from_pretrained(back)) == load_base(back).vocabulary.size == 379
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": -1}')
    (folder / "added_tokens.json").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"(?s)number of extra ids is wrong.*tokenizer_config.json.*-1"):
        t5_models.open_hf(folder)


def test_a_tokenizer_file_of_another_kind_travels_as_it_is(tmp_path, texts):
    """BPE, which SentencePiece's models here cannot stand for."""
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "source")
    real.write_tokenizer(tmp_path / "source", real.make_tokenizer("bpe", texts, vocab_size=310))
    back = there_and_back(tmp_path / "source", tmp_path)
    ours = load_base(tmp_path / "elm").vocabulary
    for folder in (tmp_path / "source", back):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert all([*ours.encode(text), 1] == theirs(text).input_ids for text in texts[:100])
    assert (back / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert not (back / "spiece.model").exists()
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    hf_tokenizer.write_files(storage.as_path(fresh), hf_tokenizer.vocabulary_files(ours.contents))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(fresh)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    assert all([*ours.encode(text), 1] == theirs(text).input_ids for text in texts[:100])


def test_added_tokens_act_here_and_travel_along(tmp_path, vocabulary_proto):
    """Also in a base that an older version wrote, which kept them beside its SentencePiece model."""
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", tmp_path / "source")
    hf_tokenizer.write_files(storage.as_path(tmp_path / "source"),
                             hf_tokenizer.vocabulary_files(vocabulary_proto))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_tokens(["<speaker>"])
    tokenizer.save_pretrained(tmp_path / "source")
    back = transformers.AutoTokenizer.from_pretrained(there_and_back(tmp_path / "source", tmp_path))
    wanted = tokenizer("hello <speaker> hello").input_ids
    assert back("hello <speaker> hello").input_ids == wanted and 312 in wanted
    older = hf_folders.copy_of(tmp_path / "elm", tmp_path / "older")
    (older / "tokenizer.json").unlink()
    (older / "vocabulary.model").write_bytes(vocabulary_proto)
    values = json.loads((older / "base.json").read_text())
    values |= {"vocabulary": "vocabulary.model"}
    values["facts"]["hf"]["added_tokens"] = {"312": {"content": "<speaker>"}}
    (older / "base.json").write_text(json.dumps(values))
    for folder in ("source", "elm", "older"):
        vocabulary, _ = load_vocabulary(tmp_path / folder)
        assert [*vocabulary.encode("hello <speaker> hello"), 1] == wanted


@pytest.mark.parametrize("family", ["t5_1_0", "t5_1_1", "mt5"])
def test_a_folder_that_transformers_5_saved(family, tmp_path):
    """Its config says tie_word_embeddings=true whatever the model; ours says what the weights are."""
    model = hf_folders.build(family)
    model.save_pretrained(tmp_path / "source")
    assert json.loads((tmp_path / "source" / "config.json").read_text())["tie_word_embeddings"] is True
    assert t5_models.open_hf(tmp_path / "source").config.logits_via_embedding is (family == "t5_1_0")
    back = there_and_back(tmp_path / "source", tmp_path)
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "source"), hf_folders.stored(back))
    wanted = json.loads((tmp_path / "source" / "config.json").read_text())
    wanted["tie_word_embeddings"] = family == "t5_1_0"
    assert json.loads((back / "config.json").read_text()) == wanted
    assert t5_models.open_hf(back).config == t5_models.open_hf(tmp_path / "source").config
    merge_inputs.check_head(str(back))
    if family != "t5_1_0":
        with pytest.raises(RunError, match="tie_word_embeddings true, and a head of its own"):
            merge_inputs.check_head(str(tmp_path / "source"))


@pytest.mark.parametrize("family", ["t5_1_1", "mt5"])
def test_an_unscaled_head_that_is_the_embedding(family, tmp_path):
    """transformers 5 ties the head of a fresh T5 1.1 or mT5 and does not scale: no lm_head in the file."""
    model = hf_folders.build(family)
    model.lm_head.weight = model.shared.weight
    model.save_pretrained(tmp_path / "source")
    assert "lm_head.weight" not in hf_folders.stored(tmp_path / "source")
    base = load_base(tmp_path / "source")
    inputs = hf_folders.tokens(np.random.default_rng(0), 4, 8, 320)
    ours = logits_of(T5Network(base.config), base.params,
                     {"encoder_input_tokens": inputs, "decoder_input_tokens": inputs})
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(inputs).long(), decoder_input_ids=torch.tensor(inputs).long(),
                       attention_mask=torch.tensor(inputs > 0).long()).logits.numpy()
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4
    back = there_and_back(tmp_path / "source", tmp_path)
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "source"), hf_folders.stored(back))


def test_a_fresh_config_is_one_that_transformers_reads_alike(tmp_path):
    """A model that never was in a Hugging Face folder: no facts travel, the config is made new."""
    for family in ("t5_1_0", "t5_1_1", "t5_1_1_tied"):
        model = hf_folders.build(family)
        hf_folders.publish(model, family, tmp_path / family)
        opened = t5_models.open_hf(tmp_path / family)
        bare = type(opened)("t5x", "nowhere", opened.config, opened.tensors)
        t5_models.write_hf(tmp_path / f"{family}_fresh", bare)
        back = type(model).from_pretrained(tmp_path / f"{family}_fresh").eval()
        assert t5_models.open_hf(tmp_path / f"{family}_fresh").config == opened.config
        feed = {name: torch.tensor([[5, 7, 9, 1]]) for name in ("input_ids", "decoder_input_ids")}
        with torch.no_grad():
            assert torch.equal(model(**feed).logits, back(**feed).logits)


@pytest.mark.parametrize("old", [False, True])
def test_pytorch_files_with_copies_and_leftovers(old, tmp_path):
    """The first T5 folders: the embedding three times over, a bias that nobody uses, torch's old format."""
    model = hf_folders.build("t5_1_0")
    hf_folders.publish(model, "t5_1_0", tmp_path / "safe")
    hf_folders.publish_as_torch(model, "t5_1_0", tmp_path / "source",
                                _use_new_zipfile_serialization=not old)
    opened = t5_models.open_hf(tmp_path / "source")
    assert any("encoder.embed_tokens.weight" in note and "EncDec" in note for note in opened.notes)
    assert any("before 1.6" in note for note in opened.notes) is old
    assert load_base(tmp_path / "source").fingerprint == load_base(tmp_path / "safe").fingerprint
    hf_folders.assert_same_bits(hf_folders.stored(there_and_back(tmp_path / "source", tmp_path)),
                                hf_folders.stored(tmp_path / "safe"))


def test_pytorch_shards_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "_REOPEN_BYTES", 5_000)  # so that files are mapped anew in mid-read
    model = hf_folders.build("t5_1_1", torch.bfloat16)
    hf_folders.publish(model, "t5_1_1", tmp_path / "safe")
    folder = tmp_path / "source"
    folder.mkdir()
    names = sorted(model.state_dict())
    table = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(names)
             if "embed_tokens" not in name}
    for file in sorted(set(table.values())):
        torch.save({name: model.state_dict()[name] for name in table if table[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(hf_folders.PUBLISHED["t5_1_1"]))
    hf_folders.assert_same_bits(hf_folders.stored(there_and_back(folder, tmp_path)),
                                hf_folders.stored(tmp_path / "safe"))


def test_one_model_has_one_fingerprint_in_every_format_and_dtype(tmp_path):
    model = hf_folders.build("t5_1_1", torch.bfloat16)
    hf_folders.publish(model, "t5_1_1", tmp_path / "bfloat16")
    hf_folders.publish(model.float(), "t5_1_1", tmp_path / "float32")
    elm_folders.write_elm(tmp_path / "elm", t5_models.open_hf(tmp_path / "bfloat16"))
    bases = [load_base(tmp_path / name) for name in ("bfloat16", "float32", "elm")]
    assert len({base.fingerprint for base in bases}) == 1
    for base in bases:
        assert base.fingerprint == trees.fingerprint(base.params)
        assert {str(leaf.dtype) for leaf in trees.flatten(base.params).values()} == {"float32"}


def test_the_published_rows_of_mt5(tmp_path):
    """250,112 rows, the number that mT5 has."""
    config = {**hf_folders.PUBLISHED["mt5"], "vocab_size": 250112, "d_model": 8}
    model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(
        **{k: v for k, v in config.items() if k not in ("architectures", "model_type")})).to(torch.bfloat16)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(250112, 8, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    back = there_and_back(tmp_path / "source", tmp_path)
    hf_folders.assert_same_bits(hf_folders.stored(tmp_path / "source"), hf_folders.stored(back))
    bare = t5_models.open_hf(back)
    t5_models.write_hf(tmp_path / "fresh", type(bare)("t5x", "nowhere", bare.config, bare.tensors))
    assert json.loads((tmp_path / "fresh" / "config.json").read_text())["model_type"] == "mt5"


# What must be refused, each by one clear error that says where and what.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of several shards that is as it should be."""
    folder = tmp_path_factory.mktemp("whole") / "t5"
    hf_folders.publish(hf_folders.build("t5_1_1"), "t5_1_1", folder, shard_size="30KB")
    return folder


@pytest.fixture
def spoilt(whole, tmp_path):
    return hf_folders.copy_of(whole, tmp_path / "spoilt")


def refuse(folder, words):
    with pytest.raises(InputError, match=words) as caught:
        t5_models.open_hf(folder)
    return str(caught.value)


def change_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def test_a_truncated_shard(spoilt):
    shard = sorted(spoilt.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refuse(spoilt, "safetensors file is truncated")
    assert shard.name in message and "bytes" in message


def test_missing_shards_are_all_named(spoilt):
    gone = sorted(spoilt.glob("model-*.safetensors"))[1:3]
    for shard in gone:
        shard.unlink()
    message = refuse(spoilt, "Shards are missing")
    assert all(shard.name in message for shard in gone)


def test_a_shard_that_holds_other_tensors_than_the_index_says(spoilt):
    shards = sorted(spoilt.glob("model-*.safetensors"))
    shards[0].write_bytes(shards[1].read_bytes())
    refuse(spoilt, "do not agree(.|\n)*is not in model-00001")


def test_an_index_that_leads_out_of_the_folder(spoilt):
    path = spoilt / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of", "../model-00001-of"))
    refuse(spoilt, "must be the name of a file in the same folder")


def test_a_config_that_does_not_fit_names_every_tensor(spoilt):
    change_config(spoilt, d_ff=48, num_layers=1)
    message = refuse(spoilt, "weights do not fit the config")
    assert message.count("[40, 24] instead of [48, 24]") == 2 * (1 + 3)
    assert message.count("[24, 40] instead of [24, 48]") == 1 + 3
    unexpected = message.split("unexpected (9): ")[1].split(";")[0].split(", ")
    assert len(unexpected) == 9 and all(name.startswith("encoder.block.1.") for name in unexpected)


def test_a_config_of_more_layers_names_what_is_missing(spoilt):
    change_config(spoilt, num_decoder_layers=4)
    message = refuse(spoilt, "weights do not fit the config")
    missing = message.split("missing (14): ")[1].split("\n")[0].split(", ")
    assert len(missing) == 14 and all(name.startswith("decoder.block.3.") for name in missing)


def test_an_untied_config_without_a_head(tmp_path):
    hf_folders.publish(hf_folders.build("t5_1_1_tied"), "t5_1_1", tmp_path / "t5")
    assert "missing (1): lm_head.weight" in refuse(tmp_path / "t5", "do not fit the config")


def test_a_tied_config_with_another_head(spoilt):
    change_config(spoilt, tie_word_embeddings=True)
    refuse(spoilt, "lm_head.weight differs from shared.weight(.|\n)*tie_word_embeddings to false")


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "bart"}, "no T5(.|\n)*'bart'"),
    ({"d_ff": ..., "d_kv": ...}, "lacks fields(.|\n)*no d_kv, no d_ff"),
    ({"feed_forward_proj": "gated-silu"}, "gated-silu"),
    ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05"),
    ({"decoder_start_token_id": 2, "pad_token_id": 3}, "pad_token_id 3, decoder_start_token_id 2"),
    ({"d_model": "24"}, "emb_dim"),
])
def test_configs_that_are_not_ours_to_run(spoilt, changes, words):
    change_config(spoilt, **changes)
    refuse(spoilt, words)


def test_a_config_that_is_no_json(spoilt):
    (spoilt / "config.json").write_text('{"model_type": "t5",')
    refuse(spoilt, "config.json is not valid JSON")


def test_a_folder_without_weights_lists_what_is_there(spoilt):
    for path in spoilt.glob("model*"):
        path.unlink()
    (spoilt / "tf_model.h5").write_text("")
    assert "tf_model.h5" in refuse(spoilt, "no weights that this program reads")


def test_whole_numbers_are_no_parameters(tmp_path):
    model = hf_folders.build("t5_1_1")
    hf_folders.publish(model, "t5_1_1", tmp_path / "t5")
    tensors = hf_folders.stored(tmp_path / "t5")
    tensors["shared.weight"] = tensors["shared.weight"].to(torch.int8)
    safetensors.torch.save_file(tensors, tmp_path / "t5" / "model.safetensors")
    refuse(tmp_path / "t5", "no parameter's(.|\n)*shared.weight: int8")


def test_float8_leaves_as_the_bfloat16_that_it_is_read_as(tmp_path):
    """The values are torch's, and the config does not ask for a cast back."""
    model = hf_folders.build("t5_1_1", torch.float32)
    hf_folders.publish(model, "t5_1_1", tmp_path / "t5")
    stored = hf_folders.stored(tmp_path / "t5")
    narrow = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored.items()}
    safetensors.torch.save_file(narrow, tmp_path / "t5" / "model.safetensors")
    change_config(tmp_path / "t5", torch_dtype="float8_e4m3fn")
    back = there_and_back(tmp_path / "t5", tmp_path)
    hf_folders.assert_same_bits({name: tensor.to(torch.bfloat16) for name, tensor in narrow.items()},
                                hf_folders.stored(back))
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_weights_that_are_codes_are_named(spoilt):
    change_config(spoilt, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    refuse(spoilt, "quantised(.|\n)*quantization_config: 'fp8'")


def test_a_folder_that_is_taken_is_left_alone(whole, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="target exists already"):
        t5_models.write_hf(tmp_path, t5_models.open_hf(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_source_that_shrinks_while_it_is_read_leaves_nothing(spoilt, tmp_path):
    opened = t5_models.open_hf(spoilt)
    shard = sorted(spoilt.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:200])
    for write in (t5_models.write_hf, elm_folders.write_elm):
        with pytest.raises(InputError, match="become shorter"):
            write(tmp_path / "out", opened)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["spoilt"]


def test_shards_are_planned_in_order_and_by_size(whole):
    specs = t5_models.open_hf(whole).tensors.specs
    shards = safetensors_files.plan_shards(specs, 10_000)
    assert [name for shard in shards for name in shard] == list(specs)
    for shard in shards:
        size = sum(specs[name].nbytes for name in shard)
        assert size <= 10_000 or len(shard) == 1
