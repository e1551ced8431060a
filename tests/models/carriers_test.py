"""Which layers carry adapters: forms of the setting, cards, and where the modules are."""

import pytest

from elm_jax.errors import InputError
from elm_jax.experts.overlay import leaves_to_train
from elm_jax.models import AdapterConfig, T5Config, T5Network, families
from elm_jax.models.adapters.carriers import numbers_of
from elm_jax.runtime import trees

CONFIG = T5Config(29, 16, 2, 8, 32, 3, 2)


@pytest.mark.parametrize(("layers", "numbers"), [
    ("upper 2", {3, 4}), ("1-3", {1, 2, 3}), ((4, 1), {1, 4}), ([0], {0}), (" 2-2 ", {2})])
def test_forms(layers, numbers):
    assert numbers_of(layers, 5) == numbers


@pytest.mark.parametrize("layers", ["upper 0", "upper 6", "3-5", "3-1", "lower 2", "", (), (5,), (-1,),
                                    (1, 1), (True,), ("1",), 3, {"a": 1}])
def test_other_values_are_errors(layers):
    with pytest.raises(InputError, match=r"AdapterConfig\.layers"):
        CONFIG.with_adapter(AdapterConfig(4, layers=layers))


@pytest.mark.parametrize("adapter", [AdapterConfig(4, layers="upper 3"),
                                     AdapterConfig(kind="lora", layers=(4, 2, 3))])
def test_a_card_has_numbers_and_is_read_back(adapter):
    config = CONFIG.with_adapter(adapter)
    written = config.to_dict()
    assert written["adapter"]["layers"] == [2, 3, 4] and config.adapter.layers == (2, 3, 4)
    assert families.config_of(written) == config and hash(config) == hash(families.config_of(written))
    everywhere = CONFIG.with_adapter(AdapterConfig(4, layers="upper 5"))
    assert everywhere == CONFIG.with_adapter(AdapterConfig(4))
    assert "layers" not in everywhere.to_dict()["adapter"]


@pytest.mark.parametrize(("layers", "first"), [((1, 4), 1), ("upper 2", 3)])
def test_leaves_are_where_the_setting_says(layers, first):
    network = T5Network(CONFIG.with_adapter(AdapterConfig(4, layers=layers)))
    paths = trees.flatten(network.abstract_params())
    names = [*(f"encoder/layers_{number}/" for number in range(3)), "decoder/layers_0/", "decoder/layers_1/"]
    numbers = network.config.adapter.layers
    for number, name in enumerate(names):
        assert any(path.startswith(name) and "_adapter/" in path for path in paths) == (number in numbers)
    trained = set(filter(leaves_to_train(network, "adapter"), paths))
    norms = {path for path in paths if path.endswith("norm/scale")}
    assert {path for path in norms if path in trained} == {
        path for path in norms if network.depth_of(path) >= first}
    assert ("encoder/encoder_norm/scale" in trained) == (first <= 3)
    assert "decoder/decoder_norm/scale" in trained
    assert all("_adapter/" in path for path in filter(leaves_to_train(network, "adapter", False), paths))
    assert set(filter(leaves_to_train(network, "full"), paths)) == set(paths)
