"""T5X's names for this program's leaves, and the network config that a checkpoint's shapes imply.

T5X has two trees of one T5. Minimal T5 (`t5x.examples.t5`) has this program's own names and shapes.
Scalable T5 (`t5x.examples.scalable_t5`) keeps heads and head size as two dimensions of an attention
kernel, gives every layer a relative position bias of its own, and usually stacks its layers: one tensor
for all of them, ``encoder/encoder/mlp/wo/kernel``, with the layer as its second dimension. Networks with
experts (flaxformer's) have minimal T5's names, and more (`t5x_sparse`).
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

from elm_jax.errors import InputError, describe
from elm_jax.models.adapters.bottleneck import BottleneckConfig
from elm_jax.models.t5 import t5x_sparse
from elm_jax.models.t5.config import T5Config
from elm_jax.models.t5.network import T5Network
from elm_jax.runtime import trees

Shape = tuple[int, ...]
BUCKETS, MAX_DISTANCE = 32, 128
"""Relative position biases of both of T5X's networks; written there as constants."""
LAYER_AXIS = 1
_BIAS = "relpos_bias/rel_embedding"
_LAYER = re.compile(r"(encoder|decoder)/layers_(\d+)/(.+)")
_STACK = re.compile(r"(encoder|decoder)/\1/(.+)")
_ATTENTION = re.compile(r"(?:.+/)?(?:self_|encoder_decoder_)?attention/(query|key|value|out)/kernel")


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of a T5X parameter tree: minimal or scalable T5, stacked layers or not.

    Attributes:
        scanned: layers are stacked.
        own_biases: every layer has a relative position bias (scalable T5), rather than one a stack.
    """

    scanned: bool = False
    own_biases: bool = False


MINIMAL = Form()
SCALABLE = Form(scanned=True, own_biases=True)


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a leaf is in T5X's tree: the tensor's name, and the layer if the tensor stacks layers."""

    name: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Tree:
    """What the names and shapes of a T5X parameter tree imply.

    Attributes:
        config: the network.
        form: which tree it is.
        places: of every leaf. More than one where scalable T5 holds copies, which must be equal.
        wanted: name and shape of every tensor that the network has in this form.
        notes: what was assumed.
    """

    config: T5Config
    form: Form
    places: Mapping[str, tuple[TensorPlace, ...]]
    wanted: Mapping[str, Shape]
    notes: tuple[str, ...]


@functools.lru_cache(maxsize=4)
def leaf_shapes(config: T5Config) -> Mapping[str, Shape]:
    """Shape of every leaf of this program's network."""
    return {path: tuple(leaf.shape) for path, leaf in
            trees.flatten(T5Network(config).abstract_params()).items()}


def places(path: str, config: T5Config, form: Form) -> tuple[TensorPlace, ...]:
    """Places of a leaf in T5X's tree; several places hold equal copies."""
    stack, _, rest = path.partition("/")
    if rest == _BIAS and form.own_biases:
        layers = range(config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers)
        if form.scanned:
            return tuple(TensorPlace(f"{stack}/{stack}/{_BIAS}", layer) for layer in layers)
        return tuple(TensorPlace(f"{stack}/layers_{layer}/{_BIAS}") for layer in layers)
    match = _LAYER.fullmatch(path)
    if match and form.scanned:
        stack, layer, rest = match.groups()
        return (TensorPlace(f"{stack}/{stack}/{rest}", int(layer)),)
    return (TensorPlace(path),)


def split_heads(path: str, shape: Shape, config: T5Config) -> Shape:
    """A leaf's shape in scalable T5, where [H, K] are two dimensions: [D, H, K], or [H, K, D] for ``out``."""
    match = _ATTENTION.fullmatch(path)
    if not match:
        return shape
    heads = (config.num_heads, config.head_dim)
    return (*heads, shape[1]) if match.group(1) == "out" else (shape[0], *heads)


def joined_axis(path: str) -> int | None:
    """Number of the dimension H*K of an attention kernel; None for other leaves."""
    match = _ATTENTION.fullmatch(path)
    return None if match is None else int(match.group(1) != "out")


def tensor_shapes(config: T5Config, form: Form) -> dict[str, Shape]:
    """Name and shape of every tensor of T5X's own network of this config, in specs' order of leaves."""
    shapes: dict[str, Shape] = {}
    for path, shape in leaf_shapes(config).items():
        if form.own_biases:
            shape = split_heads(path, shape, config)
        for place in places(path, config, form):
            shapes.setdefault(place.name, _stacked(place, shape, config))
    return shapes


def read_tree(found: Mapping[str, Shape], where: object, gin: str = "", experts_per_token: int | None = None
              ) -> Tree:
    """Finds the network config and the form of a T5X checkpoint from its names and shapes.

    Args:
        found: shape of every tensor by T5X's name (``encoder/layers_0/...``), without ``target``.
        where: for errors.
        gin: the run's gin config, which alone says what is not in shapes of experts; empty if there is none.
        experts_per_token: in place of what it says.

    Returns:
        The tree that the checkpoint should hold; whether it does is for the caller to check.

    Raises:
        InputError: the names are of no T5, or of both forms at once; as `t5x_sparse.sparse_settings`.
    """
    layers = {stack: _layers(found, stack) for stack in ("encoder", "decoder")}
    sparse = t5x_sparse.sparse_settings(found, layers, gin, experts_per_token, where)
    form = _form(found, where)
    config = dataclasses.replace(_config(found, form), sparse=sparse)
    leaves = leaf_shapes(config)
    held = {path: places(path, config, form) for path in leaves}
    wanted: dict[str, Shape] = {}
    for path, shape in leaves.items():
        split = split_heads(path, shape, config)
        for place in held[path]:
            shapes = [_stacked(place, shape, config), _stacked(place, split, config)]
            rank = len(found.get(place.name, ()))
            # Both of T5X's ways to keep heads are read in both forms.
            wanted[place.name] = next((shape for shape in shapes if len(shape) == rank), shapes[0])
    notes = (_assumed(config), *([t5x_sparse.note(sparse, gin, experts_per_token)] if sparse else []))
    return Tree(config, form, held, wanted, notes)


def in_cheap_order(tree: Tree) -> list[str]:
    """Sorts leaves so that each tensor is read only once: the layers of a stack together."""
    first = {path: places[0] for path, places in tree.places.items()}
    return sorted(first, key=lambda path: (first[path].name, first[path].layer or 0))


def shape_hint(tree: Tree, found: Mapping[str, Shape]) -> str | None:
    """Likely cause of wrong shapes, if only the dimension of layers is missing or extra."""
    off = {len(found[name]) - len(shape) for name, shape in tree.wanted.items()
           if name in found and len(found[name]) != len(shape)}
    if tree.form.scanned and off and max(off) < 0:
        return "the names say that layers are stacked (scanned), the shapes that they are not"
    if not tree.form.scanned and off and min(off) > 0:
        return "the names say one tensor a layer, the shapes that layers are stacked (scanned)"
    return None


def _stacked(place: TensorPlace, shape: Shape, config: T5Config) -> Shape:
    if place.layer is None:
        return shape
    layers = config.num_encoder_layers if place.name.startswith("encoder") else config.num_decoder_layers
    return (*shape[:LAYER_AXIS], layers, *shape[LAYER_AXIS:])


def _form(names: Iterable[str], where: object) -> Form:
    stacked = [name for name in names if _STACK.fullmatch(name)]
    single = [name for name in names if _LAYER.fullmatch(name)]
    if stacked and single:
        raise InputError(describe(
            "The checkpoint mixes stacked (scanned) layers with one tensor a layer", where=where,
            got=f"{len(stacked)} stacked: {', '.join(stacked)}; {len(single)} single: {', '.join(single)}",
            expected="one of the two"))
    if not stacked and not single:
        raise InputError(describe(
            "The checkpoint holds no layers of a T5", where=where,
            got=", ".join(sorted(names)[:20]) or "no tensor",
            expected="encoder/layers_0/... (one tensor a layer) or encoder/encoder/... (scanned)"))
    return Form(bool(stacked), any(name.endswith(f"/{_BIAS}") for name in (*stacked, *single)))


def _config(found: Mapping[str, Shape], form: Form) -> T5Config:
    """Network config from shapes; a dimension whose tensor is missing is 1."""
    layer = r"(?:encoder|decoder)/(?:encoder|decoder|layers_\d+)"
    query = _first(found, rf"{layer}/(?:self_)?attention/query/kernel")
    joined = 1
    for size in query[1 + form.scanned:]:
        joined *= size
    bias = _first(found, rf"(?:{layer}|encoder|decoder)/{_BIAS}")
    heads = bias[0] if bias else 1
    head = _first(found, "decoder/logits_dense/kernel")
    embedding = _first(found, "token_embedder/embedding") or head[::-1]
    scale = _first(found, r".*_norm/scale")
    down = _first(found, r".*_adapter/down/kernel")
    gated = any(re.search(r"/mlp/(expert/)?wi_[01]/kernel$", name) for name in found)
    return T5Config(
        vocab_size=embedding[0] if embedding else 1,
        emb_dim=(embedding[1:] or scale or (1,))[0],
        num_heads=heads, head_dim=max(1, joined // heads),
        mlp_dim=(_first(found, rf"{layer}/mlp/(?:expert/)?wi(?:_0|_1)?/kernel") or (1,))[-1],
        num_encoder_layers=_layers(found, "encoder"), num_decoder_layers=_layers(found, "decoder"),
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding=not head,
        relative_attention_num_buckets=bias[-1] if bias else BUCKETS,
        relative_attention_max_distance=MAX_DISTANCE,
        adapter=BottleneckConfig(down[-1]) if down else None)


def _first(found: Mapping[str, Shape], pattern: str) -> Shape:
    """Shape of the first tensor, by name, that matches the pattern; empty if none does."""
    expression = re.compile(pattern)
    return next((tuple(found[name]) for name in sorted(found) if expression.fullmatch(name)), ())


def _layers(found: Mapping[str, Shape], stack: str) -> int:
    matches = [match for match in map(_LAYER.fullmatch, found) if match and match.group(1) == stack]
    indices = [int(match.group(2)) for match in matches]
    if indices:
        return 1 + max(indices)
    stacked = _first(found, rf"{stack}/{stack}/.+")
    return stacked[LAYER_AXIS] if len(stacked) > LAYER_AXIS else 1


def _assumed(config: T5Config) -> str:
    return (f"A T5X checkpoint says nothing of the network but its shapes; assumed: feed-forward "
            f"{' x '.join(config.mlp_activations)}, relative positions of {MAX_DISTANCE} and more in one "
            "bucket, no dropout")


_GIN_FIELDS = ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers",
               "num_decoder_layers", "mlp_activations", "logits_via_embedding")
_GIN_DISTANCES = ("relative_attention_num_buckets", "relative_attention_max_distance")
"""T5X's own networks have no such fields; this program's, run under T5X, does."""
_GIN_LINE = re.compile(r"^(?:[\w./]+\.)?T5Config\.(\w+)\s*=\s*(.+)$", re.MULTILINE)


def gin_text(config: T5Config, form: Form) -> str:
    """Gin bindings of the module that restores the network, to be included after T5X's model file.

    The module is T5X's own, or this program's for a network with adapters, which T5X's networks lack.
    """
    values = {name: getattr(config, name) for name in _GIN_FIELDS}
    if config.adapter is not None:
        return _gin_lines("elm_jax.models", ("t5x_module", "t5x_module"), "T5XTransformer", values,
                          "t5x_module.T5Config.adapter = @t5x_module.AdapterConfig()",
                          f"t5x_module.AdapterConfig.bottleneck = {config.bottleneck}")
    if form.own_biases:
        return _gin_lines("t5x.examples.scalable_t5", ("network", "network"), "Transformer", values,
                          f"network.T5Config.scan_layers = {form.scanned}")
    return _gin_lines("t5x.examples.t5", ("network", "network"), "Transformer", values)


def _gin_lines(package: str, modules: tuple[str, str], network: str, values: Mapping[str, object],
               *more: str) -> str:
    """Gin bindings of the classes of a network and of its config, from two modules of one package."""
    of_network, of_config = modules
    lines = ["# The network of the checkpoint beside this file. Include it after T5X's own model file.",
             "from __gin__ import dynamic_registration",
             *(f"from {package} import {module}" for module in dict.fromkeys(modules)), "",
             f"{of_network}.{network}.config = @{of_config}.T5Config()",
             *(f"{of_config}.T5Config.{name} = {value!r}" for name, value in values.items()), *more]
    return "\n".join(lines) + "\n"


def check_gin(text: str, config: T5Config, where: object) -> None:
    """Raises InputError if a gin file contradicts the config that the shapes imply; macros are skipped.

    Raises:
        InputError: they contradict each other; all fields that do are listed.
    """
    wrong = []
    for name, value in _GIN_LINE.findall(text.replace("\\\n", "")):
        if name not in (*_GIN_FIELDS, *_GIN_DISTANCES):
            continue
        try:
            said = ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        said = tuple(said) if isinstance(said, list) else said
        if said != getattr(config, name):
            wrong.append(f"{name}: {said!r} instead of {getattr(config, name)!r}")
    if wrong:
        raise InputError(describe(
            "The checkpoint is not of the network that the gin file beside it tells of", where=where,
            got="; ".join(wrong), expected="what the tensors' shapes say, and this program takes for granted",
            cure="take the file away if it belongs to another model"))
