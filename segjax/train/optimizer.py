"""AdamW under the recipe's schedule, and one guarded update. Knows nothing of losses."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from segjax.model import sharding
from segjax.rl.schedules import warmup_cosine
from segjax.settings import Optimizer
from segjax.train.state import TrainState


def make_optimizer(settings: Optimizer, total_steps: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW; the learning rate is `warmup_cosine` of the update count."""

  def schedule(count):
    return warmup_cosine(
      count,
      peak=settings.learning_rate,
      total_steps=total_steps,
      warmup_steps=warmup_steps(settings, total_steps),
      min_ratio=settings.min_ratio,
    )

  return optax.chain(
    optax.clip_by_global_norm(settings.max_grad_norm),
    optax.adamw(
      schedule,
      b1=settings.beta1,
      b2=settings.beta2,
      eps=settings.epsilon,
      weight_decay=settings.weight_decay,
    ),
  )


def warmup_steps(settings: Optimizer, total_steps: int) -> int:
  """ceil(warmup_ratio · total_steps)."""
  return -int(-settings.warmup_ratio * total_steps // 1)


def init_state(params: Any, settings: Optimizer, total_steps: int) -> TrainState:
  """Step 0 with fresh moments, laid out like the parameters they belong to."""

  def init(params):
    return sharding.constrain_tree(make_optimizer(settings, total_steps).init(params))

  return TrainState(jnp.int32(0), params, jax.jit(init)(params))


def apply_update(
  state: TrainState, grads: Any, loss: Array, settings: Optimizer, total_steps: int
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step; the old state is kept where loss or gradient norm is not finite.

  The metric `bad` is 1 for such a step. The state is donated and metrics are read a step late, so
  a bad update must never leave the jitted step.
  """
  optimizer = make_optimizer(settings, total_steps)
  grad_norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  updated = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
  state = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, state)
  return sharding.constrain_tree(state), {'grad_norm': grad_norm, 'bad': 1 - good.astype(jnp.int32)}
