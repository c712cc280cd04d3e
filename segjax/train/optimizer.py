"""AdamW under the recipe's schedule, and one guarded update. Knows nothing of losses."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from segjax.config.settings import Optimizer
from segjax.model import sharding
from segjax.train.state import TrainState


def make_optimizer(settings: Optimizer, total_steps: int) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW under `make_schedule`, which reads the count of updates."""
  adamw = optax.adamw(
    make_schedule(settings, total_steps),
    b1=settings.beta1,
    b2=settings.beta2,
    eps=settings.epsilon,
    weight_decay=settings.weight_decay,
  )
  return optax.chain(
    optax.clip_by_global_norm(settings.max_grad_norm),
    _with_moments_dtype(settings.moments_dtype, adamw),
  )


def make_schedule(settings: Optimizer, total_steps: int) -> optax.Schedule:
  """Linear warm-up from 0 to the learning rate, then half a cosine down to min_lr_ratio of it.

  The curve of transformers' 'cosine_with_min_lr' up to the last update; after it the rate stays at
  its minimum.
  """
  warmup = warmup_steps(settings, total_steps)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate,
    warmup_steps=warmup,
    # optax wants at least one step of decay, and a short run may be nothing but warm-up.
    decay_steps=max(total_steps, warmup + 1),
    end_value=settings.min_lr_ratio * settings.learning_rate,
  )


def _with_moments_dtype(
  dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`inner`, computed in float32, its state kept in `dtype`."""
  if dtype == 'float32':
    return inner

  def update(updates, state, params=None):
    updates, state = inner.update(updates, _cast(state, jnp.float32), params)
    return updates, _cast(state, dtype)

  return optax.GradientTransformation(lambda params: _cast(inner.init(params), dtype), update)


def _cast(tree: Any, dtype: Any) -> Any:
  """The floating-point arrays of the tree in `dtype`."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def _widened(tree: Any) -> Any:
  """In at least float32."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _rounded(tree: Any, like: Any, step: Array) -> Any:
  """The tree in the dtypes of `like`; bfloat16 at random, up with the share of a gap that is left.

  E[rounded] = x: steps far below a gap between bfloat16 numbers (2^-8 of the weight) still add up.
  """
  leaves, treedef = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), len(leaves))
  kinds = [leaf.dtype for leaf in jax.tree.leaves(like)]
  return treedef.unflatten(
    stochastic_round(key, leaf) if kind == jnp.bfloat16 else leaf.astype(kind)
    for key, leaf, kind in zip(keys, leaves, kinds, strict=True)
  )


def stochastic_round(key: Array, x: Float[Array, '*n']) -> Float[Array, '*n']:
  """x in bfloat16: one of its two neighbours there, with probabilities that make the mean x.

  bfloat16 is the upper half of a float32: 16 random bits are added to the lower half, which is then
  cut off. Not finite stays so.
  """
  x = x.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)


def warmup_steps(settings: Optimizer, total_steps: int) -> int:
  """ceil(warmup_ratio · total_steps)."""
  return -int(-settings.warmup_ratio * total_steps // 1)


def init_state(params: Any, settings: Optimizer, total_steps: int) -> TrainState:
  """Step 0 with fresh moments, laid out like the parameters they belong to."""

  def init(params):
    return sharding.constrain_tree(make_optimizer(settings, total_steps).init(_widened(params)))

  return TrainState(jnp.int32(0), params, jax.jit(init)(params))


def apply_update(
  state: TrainState,
  grads: Any,
  loss: Array,
  settings: Optimizer,
  total_steps: int,
  allowed: Any = True,
) -> tuple[TrainState, dict[str, Array]]:
  """One optimizer step; the old state is kept where it is not allowed, or would do harm.

  It does harm where the loss, or the norm of gradient or updated weights, is not finite. The metric
  `bad` is 1 for a step left out: weights, moments, step count and with it the schedule are as
  before it. The state is donated and metrics are read a step late, so a bad update must never leave
  the jitted step.
  """
  optimizer = make_optimizer(settings, total_steps)
  grads, params = _widened(grads), _widened(state.params)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, params)
  params = optax.apply_updates(params, updates)
  weight_norm = optax.tree.norm(params)
  good = allowed & jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(weight_norm)
  params = _rounded(params, state.params, state.step)
  updated = TrainState(state.step + 1, params, opt_state)
  state = jax.tree.map(lambda new, old: jnp.where(good, new, old), updated, state)
  metrics = {'grad_norm': grad_norm, 'weight_norm': weight_norm}
  return sharding.constrain_tree(state), metrics | {'skipped_updates': 1 - good.astype(jnp.int32)}
