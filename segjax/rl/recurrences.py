"""Recurrences along the tokens of one sequence: a loop on CPU, log T parallel steps elsewhere.

On an accelerator every pass of a loop is at least one launch, and a response has a thousand tokens;
XLA on CPU runs the loop fastest.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def by_platform(loop: Callable[..., Any], parallel: Callable[..., Any], *arrays: Array) -> Any:
  """Calls `loop` where the program is compiled for CPU, else `parallel`, which computes the same.

  Only the branch of the platform is compiled.
  """
  return jax.lax.platform_dependent(*arrays, cpu=loop, default=parallel)


def linear_backwards(a: Float[Array, 'T'], b: Float[Array, 'T']) -> Float[Array, 'T']:
  """x_t = a_t x_{t+1} + b_t from the last token to the first, which x = 0 follows.

  Two neighbouring maps x ↦ a x + b compose to such a map, associatively but for rounding. See
  Blelloch 1990, "Prefix sums and their applications".

  Args:
    a: factor of what follows each token.
    b: what each token adds; of the same dtype.
  """

  def loop(a, b):
    def step(following, token):
      x = token[0] * following + token[1]
      return x, x

    return jax.lax.scan(step, jnp.zeros((), b.dtype), (a, b), reverse=True)[1]

  def compose(later, earlier):
    return later[0] * earlier[0], earlier[0] * later[1] + earlier[1]

  def parallel(a, b):
    return jax.lax.associative_scan(compose, (a, b), reverse=True)[1]

  return by_platform(loop, parallel, a, b)


def latest(
  x: Float[Array, 'T'], mark: Bool[Array, 'T'], initial: Float[Array, ''], *, reverse: bool = False
) -> Float[Array, 'T']:
  """The x of the last marked token up to each token, itself included; `initial` before the first.

  Args:
    x: values; those of tokens without a mark may be anything.
    mark: True on the tokens whose value is handed on.
    initial: value where there is no such token; of the dtype of x.
    reverse: hands values on from the end to the beginning.
  """

  def loop(x, mark, initial):
    def step(held, token):
      held = jnp.where(token[1], token[0], held)
      return held, held

    return jax.lax.scan(step, initial, (x, mark), reverse=reverse)[1]

  def join(before, after):
    return jnp.where(after[1], after[0], before[0]), before[1] | after[1]

  def parallel(x, mark, initial):
    held, any_mark = jax.lax.associative_scan(join, (x, mark), reverse=reverse)
    return jnp.where(any_mark, held, initial)

  return by_platform(loop, parallel, x, mark, initial)


def rank(start: Bool[Array, 'T']) -> Int[Array, 'T']:
  """How many tokens there are from the last start up to each token, itself included; at least 1.

  Before the first start they are counted from the beginning.
  """

  def loop(start):
    def step(count, starts):
      count = jnp.where(starts, 1, count + 1)
      return count, count

    return jax.lax.scan(step, jnp.zeros((), jnp.int32), start)[1]

  def parallel(start):
    index = jnp.arange(start.shape[0], dtype=jnp.int32)
    return index - jax.lax.cummax(jnp.where(start, index, 0)) + 1

  return by_platform(loop, parallel, start)


def spaced(mark: Bool[Array, 'T'], distance: int) -> Bool[Array, 'T']:
  """The first marked token, and from left to right each that is `distance` from the last one kept.

  Args:
    mark: True on the candidates.
    distance: smallest difference of the indices of two tokens that are kept, at least 1.
  """

  def loop(mark):
    def step(since, marked):
      keeps = marked & (since >= distance)
      return jnp.where(keeps, 1, since + 1), keeps

    return jax.lax.scan(step, jnp.full((), distance, jnp.int32), mark)[1]

  def parallel(mark):
    size = mark.shape[0]
    index = jnp.arange(size, dtype=jnp.int32)
    # The first candidate at or after each token; `size`, which follows itself, if there is none.
    candidate = jax.lax.cummin(jnp.where(mark, index, size), reverse=True)
    jump = jnp.pad(candidate, (0, distance + 1), constant_values=size)[distance:]
    # With the tokens kept so far, those that follow them by as many steps: their number doubles.
    kept = candidate[:1]
    while kept.shape[0] * distance < size:
      kept, jump = jnp.concatenate([kept, jump[kept]]), jump[jump]
    return jnp.zeros(size, bool).at[kept].set(True, mode='drop')

  return by_platform(loop, parallel, mark)
