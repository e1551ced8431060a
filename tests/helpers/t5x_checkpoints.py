"""T5X checkpoints made without T5X: its trees with numpy, its layouts with Orbax and TensorStore."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import serialization

from elm_jax.formats.model import Index, Model, Origin, TensorSpec
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import trees

_GATED = {"mlp_activations": ("gelu", "linear"), "logits_via_embedding": False}
GENERATIONS = {
    "t5_1_0_tied": {"mlp_activations": ("relu",), "logits_via_embedding": True},
    "t5_1_0_untied": {"mlp_activations": ("relu",), "logits_via_embedding": False},
    "t5_1_1_untied": _GATED,
    "t5_1_1_tied": {**_GATED, "logits_via_embedding": True},
    "mt5": {**_GATED, "vocab_size": 90},
    "byt5": {**_GATED, "vocab_size": 384, "num_encoder_layers": 6, "num_decoder_layers": 2},
}
"""LM-adapted T5, T0 and Flan-T5 are T5 1.1 with other numbers in it."""
FORMS = {"minimal": (False, False), "scalable": (True, True), "scalable_unscanned": (False, True)}
"""By name: whether layers are stacked, whether every layer has a relative position bias."""
HEADS = re.compile(r"attention/(query|key|value|out)/kernel$")


def config(generation: str = "t5_1_1_untied") -> T5Config:
    """A toy size in which no two dimensions are equal: a transposed or misplaced weight cannot pass."""
    sizes = {"vocab_size": 50, "emb_dim": 24, "num_heads": 3, "head_dim": 5, "mlp_dim": 40,
             "num_encoder_layers": 2, "num_decoder_layers": 4}
    return T5Config(**{**sizes, **GENERATIONS[generation]})


def random_leaves(network: T5Config, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for every leaf, none of them at its initial value."""
    rng = np.random.default_rng(seed)
    shapes = trees.flatten(T5Network(network).abstract_params())
    return {path: rng.normal(size=leaf.shape).astype(jnp.dtype(dtype)) for path, leaf in shapes.items()}


def as_t5x(leaves: dict[str, np.ndarray], network: T5Config, form: str) -> dict[str, np.ndarray]:
    """The same leaves as T5X's network of this form has them; see `t5x.examples.scalable_t5.network`."""
    scanned, own_biases = FORMS[form]
    if not own_biases:
        return dict(leaves)
    counts = {"encoder": network.num_encoder_layers, "decoder": network.num_decoder_layers}
    single = {}
    for path, leaf in leaves.items():
        stack, _, rest = path.partition("/")
        match = HEADS.search(path)
        if rest == "relpos_bias/rel_embedding":
            single |= {f"{stack}/layers_{layer}/{rest}": leaf for layer in range(counts[stack])}
        elif match:
            heads = (network.num_heads, network.head_dim)
            single[path] = leaf.reshape((*heads, -1) if match.group(1) == "out" else (-1, *heads))
        else:
            single[path] = leaf
    if not scanned:
        return single
    stacked = {path: leaf for path, leaf in single.items() if "/layers_" not in path}
    for stack, count in counts.items():
        start = f"{stack}/layers_0/"
        for rest in [path.removeprefix(start) for path in single if path.startswith(start)]:
            layers = [single[f"{stack}/layers_{layer}/{rest}"] for layer in range(count)]
            stacked[f"{stack}/{stack}/{rest}"] = np.stack(layers, axis=1)
    return stacked


def train_state(leaves: dict[str, np.ndarray], step: int | np.ndarray) -> dict:
    """What T5X saves: the parameters, and an optimizer's state; the step is an int32 or the array given."""
    states = {path: {"m": np.ones((1,), np.float32), "v": np.ones(leaf.shape, np.float32)}
              for path, leaf in leaves.items() if path.endswith("_norm/scale")}
    return {"target": trees.unflatten(leaves),
            "state": {"step": step if isinstance(step, np.ndarray) else np.asarray(step, np.int32),
                      "param_states": trees.unflatten(states)}}


def write_zarr(model_dir: Path, leaves: dict[str, np.ndarray], step: int = 7, *, inline: tuple[str, ...] = (),
               compressor: str = "gzip", rows: int | None = None) -> Path:
    """The older layout, as T5X's `Checkpointer` writes it.

    Args:
        model_dir: where the step's folder goes.
        leaves: by T5X's name.
        step: of the checkpoint.
        inline: parameters that the msgpack file holds.
        compressor: of the chunks.
        rows: first dimension of a chunk; None for one chunk an array.
    """
    folder = model_dir / f"checkpoint_{step}"
    folder.mkdir(parents=True)
    state = trees.flatten(train_state(leaves, step))
    kept = {path for path in state if path.endswith("/step") or path.removeprefix("target/") in inline}
    packed = {}
    for path, leaf in state.items():
        if path in kept:
            packed[path] = leaf
            continue
        name = path.replace("/", ".")
        chunks = [rows or leaf.shape[0], *leaf.shape[1:]]
        metadata = {"shape": leaf.shape, "chunks": chunks, "compressor": {"id": compressor}}
        spec = ts.Spec({"driver": "zarr", "dtype": leaf.dtype.name, "metadata": metadata,
                        "kvstore": {"driver": "file", "path": name}}).to_json()
        packed[path] = spec
        placed = {**spec, "kvstore": {"driver": "file", "path": f"{folder}/{name}"}}
        ts.open(placed, create=True).result().write(leaf).result()
    contents = serialization.msgpack_serialize({"version": 3, "optimizer": trees.unflatten(packed)})
    (folder / "checkpoint").write_bytes(contents)
    return folder


def write_orbax(model_dir: Path, leaves: dict[str, np.ndarray], step: int | np.ndarray = 7, *,
                ocdbt: bool = True, item: str = "state") -> Path:
    """Orbax's layout, by Orbax's own checkpoint manager with the options that T5X gives it."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", create=True)
    with ocp.CheckpointManager(model_dir, options=options, item_handlers={item: handler}) as manager:
        saved = ocp.args.PyTreeSave(train_state(leaves, step))
        manager.save(int(step), args=ocp.args.Composite(**{item: saved}))
    return model_dir / f"checkpoint_{int(step)}"


def read_tree(model_dir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """T5X's parameters by T5X's names, as Orbax's own checkpoint manager reads them.

    Args:
        model_dir: with one checkpoint.
        step: which it must be.
    """
    options = ocp.CheckpointManagerOptions(step_prefix="checkpoint", read_only=True)
    handlers = {"state": ocp.PyTreeCheckpointHandler(use_ocdbt=True)}
    with ocp.CheckpointManager(model_dir, options=options, item_handlers=handlers) as manager:
        found = manager.latest_step()
        assert manager.all_steps() == [found] and step in (None, found)
        state = manager.restore(found, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    assert int(state["state"]["step"]) == found
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(state["target"]).items()}


WRITERS = {
    "zarr": write_zarr,
    "orbax": write_orbax,
    "orbax_folders": lambda folder, leaves, step=7: write_orbax(folder, leaves, step, ocdbt=False),
    "orbax_default": lambda folder, leaves, step=7: write_orbax(folder, leaves, step, item="default"),
}


def write(writer: str, folder: Path, form: str, generation: str = "t5_1_1_untied", dtype: str = "float32",
          step: int = 7) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint made without this program: its step's folder, and this program's leaves in it."""
    network = config(generation)
    leaves = random_leaves(network, dtype)
    return WRITERS[writer](folder, as_t5x(leaves, network, form), step), leaves


class MemoryTensors:
    """`Tensors` that lie in memory."""

    def __init__(self, leaves: dict[str, np.ndarray]) -> None:
        self._leaves = leaves
        self.specs = {path: TensorSpec(leaf.shape, leaf.dtype.name) for path, leaf in leaves.items()}
        self.origins = {path: Origin(path) for path in leaves}

    def read(self, path: str, index: Index | None = None) -> np.ndarray:
        """A copy of the leaf, or of a part of it."""
        return self._leaves[path][... if index is None else index].copy()


def memory_model(network: T5Config, leaves: dict[str, np.ndarray], **fields: object) -> Model:
    """A model that lies in memory."""
    return Model("elm", "memory", network, MemoryTensors(leaves), **fields)


def read_all(model: Model) -> dict[str, np.ndarray]:
    """Every leaf of a model."""
    return {path: model.tensors.read(path) for path in model.tensors.specs}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert sorted(found) == sorted(wanted)
    for path, leaf in wanted.items():
        assert (found[path].shape, found[path].dtype) == (leaf.shape, leaf.dtype), path
        assert found[path].tobytes() == np.ascontiguousarray(leaf).tobytes(), path
