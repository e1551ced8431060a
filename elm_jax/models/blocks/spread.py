"""How a sparse layer lies on a mesh: its groups and experts over devices, and what moves between them.

Experts are split as the rules split their kernels. Where the groups of tokens are split over the same axes of
the mesh, each device routes its own groups and rows move to the devices that hold their experts, by an
all-to-all, and back (Lepikhin et al., https://arxiv.org/abs/2006.16668). Elsewhere each device computes its
own experts for all rows that it holds, and outputs are summed. Groups are rows of the batch, so that results
do not depend on the mesh.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from elm_jax.models.layers.gates import ExpertChoices
from elm_jax.runtime import sharding
from elm_jax.runtime.sharding import Axes, Rules
from elm_jax.types import Array

KERNEL_AXES = ("expert", "embed", "expert_mlp")
"""Logical axes of an expert's inner kernels [E, D, F]; those of the outer one are the same, turned round."""


class Spread(NamedTuple):
    """Axes of a mesh over which a sparse layer is split; all empty on one device.

    Attributes:
        mesh: None for one device.
        groups: over which the rows of the batch are split.
        experts: over which the experts are; either the last ones of `groups`, or none of them.
        hidden: over which the experts' hidden width is.
        stacked: whether the layer is mapped over networks.
    """

    mesh: Mesh | None = None
    groups: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    stacked: bool = False

    @property
    def exchanges(self) -> bool:
        """Whether rows move between the devices of an expert's axes; else each has all of them."""
        return bool(self.experts) and self.experts[-1] in self.groups

    def over(self, function: Callable[..., tuple[Array, Any]]) -> Callable[..., tuple[Array, Any]]:
        """Runs a function on every device's part.

        Args:
            function: ``(x f[B, L, D], logits f32[B, L, E], real bool[B, L], kernels, keep f[E, G, 1, F] or
                None) -> (f[B, L, D], sums)``; it makes the sums whole by `total`.
        """
        if self.mesh is None:
            return function
        rows, inner = PartitionSpec(self.groups), PartitionSpec(self.experts, None, self.hidden)
        others = tuple(axis for axis in self.groups if axis not in self.experts)

        def spread(x: Array, logits: Array, real: Array, kernels: tuple[Array, ...], keep: Array | None
                   ) -> tuple[Array, Any]:
            outer = PartitionSpec(self.experts, self.hidden, None)
            kept = PartitionSpec(self.experts, others, None, self.hidden)
            specs = (rows, rows, rows, (*[inner] * (len(kernels) - 1), outer), kept)
            # Where an axis is mapped over some of the arrays only, JAX 0.10.2 cannot tell what differs
            # between devices; without that some gradients are summed twice, the second time in vain.
            mapped = jax.shard_map(function, mesh=self.mesh, in_specs=specs,
                                   out_specs=(rows, PartitionSpec()), check_vma=not self.stacked)
            return mapped(x, logits, real, kernels, keep)

        return spread

    def varying(self, tree: Any, known: tuple[str, ...]) -> Any:
        """Marks arrays as different on every device, so that their gradients are summed here and not later.

        Without it they would be summed where an array meets a kernel: K times as many rows, for each kernel.

        Args:
            tree: arrays.
            known: axes over which they are different already.
        """
        axes = tuple(dict.fromkeys((*self.groups, *self.experts, *self.hidden)))
        missing = tuple(axis for axis in axes if axis not in known)
        return jax.lax.pcast(tree, missing, to="varying") if missing else tree

    def own(self, choices: Any, num_experts: int) -> Any:
        """The choices of, or by, this device's experts, which are counted from 0.

        Args:
            choices: `TokenChoices` or `ExpertChoices`.
            num_experts: E of the layer.
        """
        count = self.num_own(num_experts)
        if count == num_experts:
            return choices
        first = jax.lax.axis_index(self.experts) * count
        if isinstance(choices, ExpertChoices):
            return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, 1), choices)
        experts = choices.experts - first
        return choices._replace(experts=experts.clip(0, count - 1),
                                kept=choices.kept & (experts >= 0) & (experts < count))

    def to_experts(self, rows: Array) -> Array:
        """Moves rows to the devices of their experts: f[E, S, D] -> f[E / n, n * S, D]."""
        return jax.lax.all_to_all(rows, self.experts, 0, 1, tiled=True) if self.exchanges else rows

    def from_experts(self, rows: Array) -> Array:
        """Inverse of `to_experts`."""
        return jax.lax.all_to_all(rows, self.experts, 1, 0, tiled=True) if self.exchanges else rows

    def gathered(self, tree: Any) -> Any:
        """All groups of the devices that exchange rows: leaves [G, ...] -> [n * G, ...]."""
        if not self.exchanges:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, self.experts, tiled=True), tree)

    def summed(self, y: Array, gathered: bool = False) -> Array:
        """Sums the devices' parts of the outputs: f[T, D], of hidden widths and of experts.

        Args:
            y: of this device.
            gathered: they are of `gathered` groups, f[n * T, D].
        """
        axes = self.hidden if self.exchanges else (*self.hidden, *self.experts)
        y = jax.lax.psum(y, axes) if axes else y
        return jax.lax.psum_scatter(y, self.experts, tiled=True) if gathered and self.exchanges else y

    def total(self, sums: Any) -> Any:
        """Sums over all groups of the batch."""
        return jax.lax.psum(sums, self.groups) if self.groups else sums

    def num_own(self, num_experts: int) -> int:
        """How many of E experts each device holds."""
        sizes = [self.mesh.shape[axis] for axis in self.experts]
        return num_experts // math.prod(sizes)


def spread_of(groups: int, num_experts: int, emb_dim: int, mlp_dim: int) -> Spread:
    """How a layer is spread over the mesh that `sharding.placed` has set; one device outside of it.

    Args:
        groups: of the batch; 1 if they may not be apart.
        num_experts: E.
        emb_dim: D.
        mlp_dim: F.
    """
    found = sharding.placement()
    if found is None or found.mesh.size == 1:
        return Spread()
    spread = planned(found.mesh, found.rules, groups, (num_experts, emb_dim, mlp_dim))
    return spread._replace(stacked=found.stacked)


def planned(mesh: Mesh, rules: Rules, groups: int, kernel: tuple[int, int, int]) -> Spread:
    """`spread_of`, for a mesh and rules.

    Args:
        mesh: of two devices or more.
        rules: of the mesh.
        groups: of the batch.
        kernel: (E, D, F).
    """
    spec = (*sharding.leaf_spec(Axes(("batch",)), (groups,), mesh, rules),
            *sharding.leaf_spec(Axes(KERNEL_AXES), kernel, mesh, rules))
    split, experts, _, hidden = (tuple(axis for axis in sharding.axes_in(each) if mesh.shape[axis] > 1)
                                 for each in spec)
    # Of more axes than these, kernels are gathered, as those of dense layers are.
    while experts and not (split[-len(experts):] == experts or set(experts).isdisjoint(split)):
        experts = experts[:-1]
    return Spread(mesh, split, experts, tuple(axis for axis in hidden if axis not in split))
