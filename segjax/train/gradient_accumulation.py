"""Loss and gradient of a batch that is too large for one pass, accumulated over its pieces."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from segjax.config.settings import PPO, SFT, PairTraining
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.mesh import batch_devices
from segjax.train.metrics import Metrics
from segjax.types import PackingPlan, PackingSlots

LossAndMetrics = tuple[Array, Metrics]
Objective = Callable[..., LossAndMetrics]


def value_and_grad(
  objective: Objective,
  params: Any,
  batch: Any,
  micro_batch: int,
  packing: PackingPlan | None,
  *rest: Any,
  base: Any = None,
) -> tuple[LossAndMetrics, Any]:
  """Computes Σ_j objective(base | params, piece_j, *rest, slots=slots_j), and d / d params.

  The activations of one piece exist at a time; one compiled program serves all pieces. A batch of
  one piece holds no float32 sum of gradients.

  Args:
    objective: (params, piece, *rest, slots) -> (loss, metrics), all scalars that add up to those
      of the whole batch: sums over rows, divided by counts of the whole batch, which are passed in
      `rest`. `Metrics.max` is combined by the maximum instead.
    params: parameters of a network of `segjax.model`, whose layout the gradient keeps.
    batch: a pytree of arrays, rows in axis 0 of each.
    micro_batch: rows of a piece without packing, see `rows_at_once`; 0 for all. Piece j of n holds
      the rows j, j + n, j + 2n, ... so that no row leaves its device. `slots` is None.
    packing: which sequences form a piece, and their slots in its packed rows; a row of the batch
      may be several consecutive sequences. Slots of length 0 are empty, and the objective must
      ignore the rows that it receives for them.
    base: frozen parameters of the network, beside those that are trained.

  Returns:
    ((loss, metrics), gradient), the gradient in the dtypes of the parameters; it is accumulated in
    at least float32.

  Raises:
    UserError: the arrays differ in rows, or micro_batch does not divide them.
  """
  evaluate = jax.value_and_grad(_of_trained(objective, base), has_aux=True)
  if packing is None:
    pieces = _num_pieces(micro_batch, batch)
    if pieces == 1:
      return evaluate(params, batch, *rest, slots=None)
    parts = jax.tree.map(functools.partial(_split, pieces=pieces), batch)

    def piece(j):
      # Without the constraint, indexing by a traced j may gather the rows on every device.
      part = jax.tree.map(lambda x: sharding.constrain_batch(x[j]), parts)
      return evaluate(params, part, *rest, slots=None)

    return _accumulate(piece, params, pieces)

  def packed_piece(j):
    slots: PackingSlots = jax.tree.map(lambda x: x[j], packing.pieces)
    # Empty slots have sequence -1; they read row 0, which their length of 0 masks out.
    rows = jnp.maximum(slots.sequence[:: slots.group] // slots.group, 0)
    part = jax.tree.map(lambda x: sharding.constrain_batch(x[rows]), batch)
    return evaluate(params, part, *rest, slots=slots)

  if packing.count is not None:
    return _accumulate(packed_piece, params, packing.count)
  pieces = len(packing.pieces.sequence)
  return packed_piece(0) if pieces == 1 else _accumulate(packed_piece, params, pieces)


def _of_trained(objective: Objective, base: Any) -> Objective:
  if not base:
    return objective
  return lambda params, *rest, slots: objective(base | params, *rest, slots=slots)


def rows_at_once(settings: SFT | PairTraining | PPO, rows: int, tokens: int) -> int:
  """Returns the rows of a piece without packing: micro_batch_size, or those of micro_batch_tokens.

  The latter are the largest number that divides the batch and over the devices; at least one each.

  Args:
    rows: of the batch.
    tokens: of a row.
  """
  if not settings.micro_batch_tokens:
    return settings.micro_batch_size
  mesh = sharding.active_mesh()
  size, devices = (mesh.size, batch_devices(mesh)) if mesh else (1, 1)
  most = settings.micro_batch_tokens * size // tokens
  return max((n for n in range(devices, most + 1, devices) if rows % n == 0), default=devices)


def _accumulate(
  piece: Callable[[Array], Any], params: Any, count: Any
) -> tuple[LossAndMetrics, Any]:
  """Combines pieces 0 to count - 1; `count` may be an array, known only at run time."""

  def add(j, total):
    (loss, metrics), grads = piece(j)
    (loss_before, before), grads_before = total
    metrics = Metrics(
      mean=jax.tree.map(jnp.add, before.mean, metrics.mean),
      max=jax.tree.map(jnp.maximum, before.max, metrics.max),
      sum=jax.tree.map(jnp.add, before.sum, metrics.sum),
    )
    # The sum is laid out like the parameters: a copy per device of a large model would not fit.
    grads = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), grads_before, grads)
    return (loss_before + loss, metrics), sharding.constrain_tree(grads)

  # Runs nothing: only the names and types of the metrics are needed to start the sums.
  (loss, shapes), _ = jax.eval_shape(piece, jnp.int32(0))

  def filled(tree, value):
    return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)

  # The neutral element of each way to combine.
  start = Metrics(filled(shapes.mean, 0), filled(shapes.max, -jnp.inf), filled(shapes.sum, 0))
  zeros = sharding.constrain_tree(jax.tree.map(_wide_zeros, params))
  total = (jnp.zeros(loss.shape, loss.dtype), start), zeros
  # A traced `count` makes this a while loop, so that one program serves every packing.
  loss_and_metrics, grads = jax.lax.fori_loop(0, count, add, total)
  # Once, after the sum: the dtypes are those of a single pass, for any number of pieces.
  grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)
  return loss_and_metrics, grads


def _num_pieces(micro_batch: int, batch: Any) -> int:
  counts = sorted({x.shape[0] for x in jax.tree.leaves(batch)})
  if len(counts) != 1:
    raise UserError(f'the arrays of a batch have {counts} rows; all must have the same number.')
  (rows,) = counts
  if micro_batch and rows % micro_batch:
    fits = ', '.join(str(n) for n in range(1, rows + 1) if not rows % n)
    raise UserError(
      f'micro_batch={micro_batch} does not divide the {rows} rows of the batch; use {fits}.'
    )
  return rows // micro_batch if micro_batch else 1


def _split(x: Array, pieces: int) -> Array:
  """Reshapes [B, ...] to [n, B / n, ...]; each device splits its own rows."""
  # Strided: the split axis stays in front. Pieces of consecutive rows would lie on few devices.
  x = sharding.constrain_batch(x.reshape(-1, pieces, *x.shape[1:]))
  return jnp.moveaxis(x, 1, 0)


def _wide_zeros(leaf: Array) -> Array:
  """Returns zeros in at least float32: a sum of many bfloat16 gradients would lose small ones."""
  return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
