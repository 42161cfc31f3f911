"""The engine: an optimizer of one block, on all blocks of all matrices of a tree."""

import collections
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mup_jax.transforms.blocking import Blocking, Segment, Sides
from mup_jax.transforms.groups import Groups, MatrixGroups
from mup_jax.transforms.loops import at_once_of, check_alike, in_parts, refresh_where
from mup_jax.transforms.matrices import PyTree, WeightDimensionNumbers
from mup_jax.transforms.options import check_static, check_steps
from mup_jax.transforms.platforms import FLOOR
from mup_jax.transforms.rule import AnyRule, Block, BlockRule, rule_for
from mup_jax.transforms.schedule import Positions, RefreshSchedule
from mup_jax.transforms.sharding_plan import (
    IN,
    OUT,
    STACK,
    UNDIVIDED,
    ShardingPlan,
    StateArray,
    plan_sharding,
)


class Blocks(NamedTuple):
    """The state of equal blocks `(n, rows, columns)`, those axes first in every array."""

    state: Any  # of the rule
    started: jax.Array | None  # bool: had a gradient that is not zero; None without refreshes


class ScaleByBlocksState(NamedTuple):
    """State of `scale_by_blocks`."""

    count: jax.Array  # type: ignore[assignment]  # int32: steps so far
    blocks: dict[str, list[Blocks]]  # for each matrix shape, as "8x256x1024": its equal blocks
    nonfinite: jax.Array  # int32: matrices of gradients skipped so far


@dataclass(frozen=True)
class _Piece:
    """Equal blocks of the matrices of a group: on a device a grid `(n, rows, columns)` of them."""

    plan: ShardingPlan
    row: Segment
    column: Segment
    rule: AnyRule

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.plan.part[STACK], self.row.number, self.column.number

    @property
    def shape(self) -> tuple[int, int]:
        """Of a block, or of the part of it that the device has."""
        return self.row.size, self.column.size

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """Equal for blocks that one call of the rule's functions can take together."""
        return self.shape, self.block.shape, self.plan.on, self.plan.names(*self.plan.parted)

    @property
    def block(self) -> Block:
        over_parts = lambda reduction: lambda x: self.plan.reduce(reduction, x, *self.plan.parted)
        sizes = list(self.shape)
        for axis in self.plan.parted:
            sizes[axis - 1] = self.plan.shape[axis]
        shape = (sizes[0], sizes[1])
        return Block(shape, self.plan.on, over_parts(jax.lax.psum), over_parts(jax.lax.pmax))

    @cached_property
    def block_rule(self) -> BlockRule:
        return rule_for(self.rule, self.block)

    @property
    def is_refreshed(self) -> bool:
        return self.block_rule.refresh is not None

    def new_blocks(self) -> Blocks:
        stack = lambda x: jnp.broadcast_to(x, (*self.grid, *jnp.shape(x)))
        state = jax.tree.map(stack, self.block_rule.init(self.shape))
        return Blocks(state, jnp.zeros(self.grid, bool) if self.is_refreshed else None)

    def state_arrays(self) -> Blocks:
        """The `StateArray`s of these blocks, where they are those of all devices."""
        blocks = jax.eval_shape(self.new_blocks)
        leaves, treedef = jax.tree.flatten(blocks)
        along = {axis: self._axes_along(axis) for axis in self.plan.parted}

        def array(i: int, x: jax.ShapeDtypeStruct) -> StateArray:
            in_axis, out_axis = (along[axis][i] if axis in along else axis for axis in (IN, OUT))
            return StateArray(x.shape, x.dtype, (STACK, in_axis, out_axis))

        return jax.tree.unflatten(treedef, [array(i, x) for i, x in enumerate(leaves)])

    def _axes_along(self, side: int) -> list[int | None]:
        """Which axis of each array of the state goes with a side of the block, if any."""
        longer = [segment._replace(size=segment.size + 1) for segment in (self.row, self.column)]
        row, column = (longer[0], self.column) if side == IN else (self.row, longer[1])
        other = replace(self, row=row, column=column)
        pairs = zip(
            *(jax.tree.leaves(jax.eval_shape(piece.new_blocks)) for piece in (self, other)),
            strict=True,
        )
        changed = [np.flatnonzero(np.subtract(x.shape, y.shape)) for x, y in pairs]
        return [int(axes[0]) if len(axes) else None for axes in changed]


def _map_blocks(function: Callable[..., Any], *trees: PyTree) -> PyTree:
    """`function` of each block, on trees of arrays `(n, rows, columns, ...)`."""
    grid = jax.tree.leaves(trees)[0].shape[:3]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), trees)
    whole = dict(zip(map(id, jax.tree.leaves(flat)), jax.tree.leaves(trees), strict=True))
    # What the function passes on is passed on as it was.
    restore = lambda x: whole[id(x)] if id(x) in whole else x.reshape(*grid, *x.shape[1:])
    return jax.tree.map(restore, jax.vmap(function)(*flat))


def _where(flags: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where a flag is set, in the dtypes of `old`; flags for the first axes of the arrays."""
    check_alike(new, old)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        if new is old:
            return old
        column = flags.reshape(*flags.shape, *[1] * (old.ndim - flags.ndim))
        return jnp.where(column, new.astype(old.dtype), old)

    return jax.tree.map(choose, new, old)


@dataclass(frozen=True)
class _Engine:
    """One step of a rule on a device's part of all groups."""

    rule: AnyRule
    blocking: Blocking
    schedule: RefreshSchedule
    plans: dict[str, ShardingPlan]

    def pieces(self, plan: ShardingPlan) -> list[_Piece]:
        _, d_in, d_out = plan.part
        segments = self.blocking.pieces(d_in, d_out, plan.on)
        return [_Piece(plan, row, column, self.rule) for row, column in segments]

    @cached_property
    def arrays(self) -> dict[str, list[Blocks]]:
        """A `StateArray` for each array of the state."""
        alone = lambda plan: plan_sharding(plan.shape, UNDIVIDED, {}, self.blocking)
        return {
            key: [piece.state_arrays() for piece in self.pieces(alone(plan))]
            for key, plan in self.plans.items()
        }

    def new_blocks(self, plan: ShardingPlan) -> list[Blocks]:
        return [piece.new_blocks() for piece in self.pieces(plan)]

    def step(
        self, gradients: Groups, healthy: Groups, before: Groups, steps_before: jax.Array
    ) -> tuple[Groups, Groups]:
        """As `MatrixGroups.run` has it."""
        step = steps_before + 1
        pieces = {key: self.pieces(plan) for key, plan in self.plans.items()}
        blocks, directions = {}, {}
        with jax.named_scope("statistics"):
            for key, gradient in gradients.items():
                accumulate = partial(self._accumulate, pieces[key], step)
                inputs = (gradient, healthy[key])
                _, blocks[key] = in_parts(accumulate, gradient.size, before[key], inputs)
        with jax.named_scope("refresh"):
            blocks = self._refresh(pieces, healthy, before, blocks, steps_before)
        with jax.named_scope("direction"):
            for key, gradient in gradients.items():
                direct = partial(self._direct, pieces[key], step)
                inputs = (gradient, healthy[key])
                directions[key], blocks[key] = in_parts(direct, gradient.size, blocks[key], inputs)
        return directions, blocks

    def _split(
        self, plan: ShardingPlan, gradient: jax.Array, healthy: jax.Array
    ) -> list[jax.Array]:
        """The blocks of a gradient, zero where it is bad: what comes of those is thrown away."""
        usable = jnp.where(healthy[:, None, None], gradient, 0.0)
        return self.blocking.split(usable, plan.on)

    def _accumulate(
        self,
        pieces: list[_Piece],
        step: jax.Array,
        blocks: list[Blocks],
        inputs: tuple[jax.Array, jax.Array],
    ) -> tuple[None, list[Blocks]]:
        gradient, healthy = inputs
        new = []
        split = self._split(pieces[0].plan, gradient, healthy)
        for piece, block, (state, started) in zip(pieces, split, blocks, strict=True):
            if started is not None:
                largest = jnp.max(jnp.square(block), axis=(-2, -1))
                started = started | (piece.block.max_over_parts(largest) > FLOOR)
            changed = state
            if (accumulate := piece.block_rule.accumulate) is not None:
                function = lambda g, s, accumulate=accumulate: accumulate(g, s, step)
                changed = _map_blocks(function, block, state)
            new.append(Blocks(_where(healthy, changed, state), started))
        return None, new

    def _direct(
        self,
        pieces: list[_Piece],
        step: jax.Array,
        blocks: list[Blocks],
        inputs: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, list[Blocks]]:
        gradient, healthy = inputs
        updates, new = [], []
        split = self._split(pieces[0].plan, gradient, healthy)
        for piece, block, (state, started) in zip(pieces, split, blocks, strict=True):
            function = lambda g, s, rule=piece.block_rule: rule.direction(g, s, step)
            update, changed = _map_blocks(function, block, state)
            check_alike(update, block)
            updates.append(update.astype(jnp.float32))
            new.append(Blocks(_where(healthy, changed, state), started))
        merged = self.blocking.merge(updates, gradient.shape, pieces[0].plan.on)
        return jnp.where(healthy[:, None, None], merged, 0.0), new

    def _refresh(
        self,
        pieces: dict[str, list[_Piece]],
        healthy: Groups,
        before: Groups,
        blocks: Groups,
        steps_before: jax.Array,
    ) -> Groups:
        """Refreshes the blocks that are due; those of a kind together, whatever group has them."""
        kinds: dict[Any, list[tuple[str, int]]] = {}
        positions: dict[tuple[str, int], Positions] = {}
        numbers: collections.Counter[Any] = collections.Counter()
        for key, several in pieces.items():
            for i, piece in enumerate(several):
                if piece.is_refreshed:
                    kinds.setdefault(piece.kind, []).append((key, i))
                    # Among all blocks of that size, on whatever devices: equal on every mesh.
                    size = piece.block.shape, piece.plan.on
                    positions[key, i] = Positions.of(piece.grid, piece.plan, numbers[size])
                    numbers[size] += positions[key, i].number
        blocks = {key: list(several) for key, several in blocks.items()}
        rounds: jax.Array | int = 0
        for places in kinds.values():
            flat = lambda x: x.reshape(-1, *x.shape[3:])
            states, first, turn = [], [], []
            for key, i in places:
                state, started = blocks[key][i]
                able = flat(started & healthy[key][:, None, None])
                # The first gradient that is neither zero nor bad may come late.
                late = ~flat(before[key][i].started)
                states.append(jax.tree.map(flat, state))
                first.append(able & (late | self.schedule.is_early(steps_before)))
                in_turn = self.schedule.in_turn(positions[key, i], steps_before)
                turn.append(able & in_turn & ~first[-1])
            rule = pieces[places[0][0]][places[0][1]].block_rule
            most = self.schedule.most_in_turn([positions[place] for place in places])
            states, rounds = self._refresh_kind(
                rule, states, first, turn, most, steps_before + 1, rounds
            )
            for (key, i), state in zip(places, states, strict=True):
                old = blocks[key][i]
                reshaped = jax.tree.map(lambda x, like: x.reshape(like.shape), state, old.state)
                blocks[key][i] = old._replace(state=reshaped)
        return blocks

    def _refresh_kind(
        self,
        rule: BlockRule,
        states: list[Any],
        first: list[jax.Array],
        turn: list[jax.Array],
        most_in_turn: int,
        step: jax.Array,
        rounds: jax.Array | int,
    ) -> tuple[list[Any], jax.Array]:
        """The new states, and the number of rounds of all refreshes so far."""
        number = sum(len(flags) for flags in first)
        entries = max((math.prod(x.shape[1:]) for x in jax.tree.leaves(states[0])), default=1)
        limit = max(1, at_once_of(number * entries) // entries)
        frequency = self.schedule.frequency

        def loop(refresh: Any, due: list[jax.Array], at_once: int, share: float) -> Any:
            return refresh_where(
                lambda state: refresh(state, step),
                states,
                due,
                at_once=min(limit, at_once),
                share=share,
                rounds_before=rounds,
            )

        if rule.first_refresh is None:
            due = [a | b for a, b in zip(first, turn, strict=True)]
            at_once = limit if frequency == 1 else most_in_turn
            return loop(rule.refresh, due, at_once, 1 / frequency)
        states, rounds = loop(rule.first_refresh, first, limit, 0)
        return loop(rule.refresh, turn, most_in_turn, 1 / frequency)


def scale_by_blocks(
    rule: AnyRule,
    *,
    block_size: int | None = None,
    max_preconditioner_dim: int | None = None,
    sides: Sides = "both",
    precondition_frequency: int = 1,
    first_steps: int = 1,
    stagger: bool = True,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs an optimizer of one block on every block of every matrix.

    Matrices of one shape are one stack, whatever leaves they come from; under a mesh each device
    has its share of them, or of their blocks, and of their state; and refreshes are spread over the
    steps. A matrix whose gradient is not finite in float32 gets a zero update and keeps its state.

    Args:
      rule: a `BlockRule`, or a function that makes one of a `mup_jax.Block`.
      block_size: largest block side; None for whole matrices. Edge blocks are smaller.
      max_preconditioner_dim: a longer side of a matrix is not preconditioned and not cut.
      sides: "both", or "in" or "out" to precondition one side only.
      precondition_frequency: steps between two refreshes of a block.
      first_steps: for so many steps all blocks are refreshed at every step; then the interval grows
        by a step every `first_steps` steps, until it is `precondition_frequency`.
      stagger: whether to spread the refreshes of the blocks over the steps; otherwise all at once
        where `step % precondition_frequency == 0`, with steps counted from 0.
      weight_dimension_numbers: as in `scale_by_muon`.

    Returns:
      A transformation of gradients into updates of the same shapes and dtypes.

    Raises:
      ValueError: an option is out of range; at `init` or `update`, a leaf is not a matrix or has no
        side to precondition.

    Example:
      Gradients over the norms of their blocks; `mup_jax.BlockRule` has one that keeps something.

      >>> def unit(gradient, state, step):
      ...     return gradient / (jnp.linalg.norm(gradient) + 1e-8), state
      >>> rule = mup_jax.BlockRule(lambda shape: (), unit)
      >>> params = {"w": jnp.ones((6, 4))}
      >>> tx = mup_jax.scale_by_blocks(rule, block_size=2)
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(f"{updates['w'][0, 0]:.3f}")
      0.500
    """
    check_static(
        block_size=block_size,
        max_preconditioner_dim=max_preconditioner_dim,
        precondition_frequency=precondition_frequency,
        first_steps=first_steps,
    )
    check_steps(precondition_frequency=precondition_frequency, first_steps=first_steps)
    blocking = Blocking(block_size, max_preconditioner_dim, sides)
    schedule = RefreshSchedule(precondition_frequency, first_steps, stagger)

    def prepare(tree: PyTree) -> tuple[MatrixGroups, _Engine]:
        groups = MatrixGroups(tree, weight_dimension_numbers, blocking)
        for _, d_in, d_out in (plan.shape for plan in groups.plans.values()):
            blocking.check(d_in, d_out)
        return groups, _Engine(rule, blocking, schedule, groups.plans)

    def init(params: optax.Params) -> ScaleByBlocksState:
        groups, engine = prepare(params)
        return ScaleByBlocksState(
            count=jnp.zeros((), jnp.int32),
            blocks=groups.init(engine.new_blocks, engine.arrays),
            nonfinite=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: ScaleByBlocksState, params: Any = None
    ) -> tuple[optax.Updates, ScaleByBlocksState]:
        groups, engine = prepare(updates)
        directions, blocks, skipped = groups.run(
            engine.step, updates, state.blocks, engine.arrays, state.count, params=params
        )
        count = optax.safe_increment(state.count)
        return directions, ScaleByBlocksState(count, blocks, state.nonfinite + skipped)

    return optax.with_extra_args_support(optax.GradientTransformation(init, update))
