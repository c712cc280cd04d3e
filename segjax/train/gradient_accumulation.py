"""Loss and gradient of a batch that is too large for one pass, added up over pieces of it.

The objectives and what is done with the gradient are the business of the steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from segjax.errors import UserError
from segjax.model import sharding
from segjax.types import PackingPlan, PackingSlots

LossAndMetrics = tuple[Array, dict[str, Array]]
Objective = Callable[..., LossAndMetrics]


def value_and_grad(
  objective: Objective,
  params: Any,
  batch: Any,
  micro_batch: int,
  packing: PackingPlan | None,
  *rest: Any,
) -> tuple[LossAndMetrics, Any]:
  """Σ_j objective(params, piece_j, *rest, places=places_j) and its gradient by the parameters.

  The activations of one piece exist at a time, and its program is compiled once for all.

  Args:
    objective: (params, piece, *rest, places) -> (loss, metrics), all scalars that add up to those
      of the whole batch: sums over rows, divided by counts of the whole batch, which come in
      `rest`. Metrics with 'max' in their name are not added up, the largest is taken.
    params: of the networks of `segjax.model`, whose layout the gradient keeps.
    batch: a pytree of arrays, the rows in axis 0 of each.
    micro_batch: rows of a piece without packing; 0 for all. Piece j of n holds the rows j, j + n,
      j + 2n, … so that no row leaves its device. `places` is None.
    packing: pieces of rows by their number, and where the network finds their sequences; a row of
      the batch may be several sequences that follow each other. Places of length 0 are empty, and
      the rows given for them are to be ignored.

  Returns:
    ((loss, metrics), gradient), the gradient in the dtypes of the parameters; it is added up in
    at least float32.

  Raises:
    ValueError: where the arrays differ in rows, or micro_batch does not divide them.
  """
  evaluate = jax.value_and_grad(objective, has_aux=True)
  if packing is None:
    pieces = _number(micro_batch, batch)
    if pieces == 1:
      return evaluate(params, batch, *rest, places=None)
    parts = jax.tree.map(functools.partial(_split, pieces=pieces), batch)

    def piece(j):
      part = jax.tree.map(lambda x: sharding.constrain_batch(x[j]), parts)
      return evaluate(params, part, *rest, places=None)

    return _added_up(piece, params, pieces)

  def packed_piece(j):
    places: PackingSlots = jax.tree.map(lambda x: x[j], packing.pieces)
    rows = jnp.maximum(places.sequence[:: places.group] // places.group, 0)
    part = jax.tree.map(lambda x: sharding.constrain_batch(x[rows]), batch)
    return evaluate(params, part, *rest, places=places)

  return _added_up(packed_piece, params, packing.count)


def _added_up(piece: Callable[[Array], Any], params: Any, count: Any) -> tuple[LossAndMetrics, Any]:
  """Loss, metrics and gradients of pieces 0 to count - 1, which may be known only when it runs."""

  def add(j, total):
    (loss, metrics), grads = piece(j)
    (loss_before, metrics_before), grads_before = total
    metrics = {
      name: (jnp.maximum if 'max' in name else jnp.add)(metrics_before[name], x)
      for name, x in metrics.items()
    }
    grads = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), grads_before, grads)
    return (loss_before + loss, metrics), sharding.constrain_tree(grads)

  (loss, metrics), _ = jax.eval_shape(piece, jnp.int32(0))
  nothing = {
    name: jnp.full(x.shape, -jnp.inf if 'max' in name else 0, x.dtype)
    for name, x in metrics.items()
  }
  zeros = sharding.constrain_tree(jax.tree.map(_wide_zeros, params))
  total = (jnp.zeros(loss.shape, loss.dtype), nothing), zeros
  found, grads = jax.lax.fori_loop(0, count, add, total)
  return found, jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)


def _number(micro_batch: int, batch: Any) -> int:
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
  """[B, ...] as [n, B / n, ...]; each device deals out its own rows."""
  x = sharding.constrain_batch(x.reshape(-1, pieces, *x.shape[1:]))
  return jnp.moveaxis(x, 1, 0)


def _wide_zeros(leaf: Array) -> Array:
  return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
