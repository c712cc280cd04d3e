"""Loss and gradient of a batch that is too large for one pass, added up over pieces of its rows.

The objectives and what is done with the gradient are the business of the steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from segjax.model import sharding

Found = tuple[Array, dict[str, Array]]


def value_and_grad(
  objective: Callable[..., Found], params: Any, batch: Any, pieces: int, *rest: Any
) -> tuple[Found, Any]:
  """Σ_j objective(params, piece_j, *rest) and its gradient with respect to the parameters.

  Piece j holds the rows j, j + n, j + 2n, … of n pieces, so that with B / n rows a multiple of the
  devices that split the batch, no row leaves its device. The activations of one piece exist at a
  time. One piece is `jax.value_and_grad`; more are scanned over, compiled once for all.

  Args:
    objective: (params, piece, *rest) -> (loss, metrics), all scalars that add up to those of the
      whole batch: sums over rows, divided by counts of the whole batch, which come in `rest`.
      Metrics with 'max' in their name are not added up, the largest is taken.
    params: of the networks of `segjax.model`, whose layout the gradient keeps.
    batch: a pytree of arrays, the rows in axis 0 of each.
    pieces: n.

  Returns:
    ((loss, metrics), gradient), the gradient in the dtypes of the parameters; it is added up in
    at least float32.

  Raises:
    ValueError: where the arrays differ in rows, or n does not divide them; it names those that do.
  """
  evaluate = jax.value_and_grad(objective, has_aux=True)
  if pieces == 1:
    return evaluate(params, batch, *rest)
  parts = jax.tree.map(functools.partial(_split, pieces=_checked(pieces, batch)), batch)

  def add(total, part):
    (loss, metrics), grads = evaluate(params, jax.tree.map(sharding.constrain_batch, part), *rest)
    total = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), total, grads)
    return sharding.constrain_tree(total), (loss, metrics)

  zeros = sharding.constrain_tree(jax.tree.map(_wide_zeros, params))
  total, (losses, metrics) = jax.lax.scan(add, zeros, parts)
  metrics = {
    name: jnp.max(x, axis=0) if 'max' in name else jnp.sum(x, axis=0) for name, x in metrics.items()
  }
  grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), total, params)
  return (jnp.sum(losses, axis=0), metrics), grads


def _checked(pieces: int, batch: Any) -> int:
  counts = sorted({x.shape[0] for x in jax.tree.leaves(batch)})
  if len(counts) != 1:
    raise ValueError(f'the arrays of a batch have {counts} rows; all must have the same number.')
  (rows,) = counts
  if pieces < 1 or rows % pieces:
    fits = ', '.join(str(n) for n in range(1, rows + 1) if not rows % n)
    raise ValueError(f'pieces={pieces} does not divide the {rows} rows of the batch; use {fits}.')
  return pieces


def _split(x: Array, pieces: int) -> Array:
  """[B, ...] as [n, B / n, ...]; each device deals out its own rows."""
  x = sharding.constrain_batch(x.reshape(-1, pieces, *x.shape[1:]))
  return jnp.moveaxis(x, 1, 0)


def _wide_zeros(leaf: Array) -> Array:
  return jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
