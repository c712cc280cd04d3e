"""AdamW with warm-up and cosine decay, training states, and an update that skips NaN."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from segjax.config.choices import DECAYED_WEIGHTS
from segjax.config.settings import Optimizer
from segjax.model import sharding
from segjax.train.metrics import Metrics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """The state that a training step updates.

  The fields are untyped because jax rebuilds the tree with shapes, shardings and host arrays in
  place of the arrays.

  Attributes:
    step: updates done, an integer scalar.
    params: the parameters.
    opt_state: the optimizer's state.
    seed: of the random bits that round bfloat16 weights; not saved, since the run determines it.
  """

  step: Any
  params: Any
  opt_state: Any
  seed: Any = 0


def make_optimizer(settings: Optimizer, total_steps: int) -> optax.GradientTransformation:
  """Returns clipping by global norm, then AdamW under `make_schedule`."""
  adamw = optax.adamw(
    make_schedule(settings, total_steps),
    b1=settings.beta1,
    b2=settings.beta2,
    eps=settings.epsilon,
    weight_decay=settings.weight_decay,
    mask=functools.partial(_is_decayed, names=DECAYED_WEIGHTS[settings.decayed_weights]),
  )
  adamw = _with_moments_dtype(settings.moments_dtype, adamw)
  # Clipped before the moments, which would remember a single large gradient for many steps.
  limit = settings.max_grad_norm or math.inf  # 0 in the settings: none
  return optax.chain(optax.clip_by_global_norm(limit), adamw)


def _is_decayed(params: Any, names: tuple[str, ...]) -> Any:
  """Returns whether the path of each parameter ends in one of the names, as a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: sharding.path_name(path).endswith(names), params
  )


def make_schedule(settings: Optimizer, total_steps: int) -> optax.Schedule:
  """Returns linear warm-up from 0 to the learning rate, then half a cosine to min_lr_ratio of it.

  The curve of transformers' 'cosine_with_min_lr' up to the last update; after it the rate stays at
  its minimum.
  """
  warmup = warmup_steps(settings, total_steps)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=settings.learning_rate,
    warmup_steps=warmup,
    # optax needs at least one step of decay, and a short run may consist of warm-up alone.
    decay_steps=max(total_steps, warmup + 1),
    end_value=settings.min_lr_ratio * settings.learning_rate,
  )


def _with_moments_dtype(
  dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns `inner`, computed in float32, with its state stored in `dtype`."""
  if dtype == 'float32':
    return inner  # `init_state` makes the moments from float32 parameters

  def update(updates, state, params=None):
    updates, state = inner.update(updates, _cast(state, jnp.float32), params)
    return updates, _cast(state, dtype)

  return optax.GradientTransformation(lambda params: _cast(inner.init(params), dtype), update)


def _cast(tree: Any, dtype: Any) -> Any:
  """Returns the tree with its floating-point arrays in `dtype`."""
  # Step counts stay integers: bfloat16 cannot count beyond 256.
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )


def _widen(tree: Any) -> Any:
  """Returns the tree in at least float32."""
  return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def _round_like(tree: Any, like: Any, seed: Array, step: Array) -> Any:
  """Rounds the tree to the dtypes of `like`; to bfloat16 stochastically.

  E[rounded] = x, so updates below one bfloat16 ulp (2^-8 of the weight) still accumulate.
  """
  leaves, treedef = jax.tree.flatten(tree)
  # Keys from seed and step: a resumed run rounds as an uninterrupted one, and neither two networks
  # nor two runs share the noise.
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step), len(leaves))
  kinds = [leaf.dtype for leaf in jax.tree.leaves(like)]
  return treedef.unflatten(
    stochastic_round(key, leaf) if kind == jnp.bfloat16 else leaf.astype(kind)
    for key, leaf, kind in zip(keys, leaves, kinds, strict=True)
  )


def stochastic_round(key: Array, x: Float[Array, '*n']) -> Float[Array, '*n']:
  """Rounds x to one of its two bfloat16 neighbours, with probabilities that make the mean x.

  bfloat16 is the upper half of a float32: 16 random bits are added to the lower half, which is then
  truncated. Infinities and NaN are kept.
  """
  x = x.astype(jnp.float32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  # The carry into bit 16 rounds up, with the probability of the fraction that is cut off.
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
  # A carry could turn a NaN into -0.
  return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)


def warmup_steps(settings: Optimizer, total_steps: int) -> int:
  """Returns ceil(warmup_ratio · total_steps)."""
  return -int(-settings.warmup_ratio * total_steps // 1)


def init_state(
  params: Any, settings: Optimizer, total_steps: int, key: Array | None = None
) -> TrainState:
  """Returns the state at step 0, with fresh moments laid out like their parameters.

  Args:
    params: the parameters.
    settings: the optimizer's hyperparameters.
    total_steps: updates in the whole run.
    key: random key of stochastic rounding, one per network and run.
  """
  seed = jnp.uint32(0) if key is None else jax.random.bits(key)

  def init(params):
    return sharding.constrain_tree(make_optimizer(settings, total_steps).init(_widen(params)))

  # Jitted: each device creates its part of the moments only.
  return TrainState(jnp.int32(0), params, jax.jit(init)(params), seed)


def apply_update(
  state: TrainState,
  grads: Any,
  loss: Array,
  settings: Optimizer,
  total_steps: int,
  enabled: Any = True,
) -> tuple[TrainState, Metrics]:
  """Applies one optimizer step, or keeps the old state where the step would corrupt it.

  A step is skipped where it is not enabled, or where the loss or the norm of the gradient or of
  the updated weights is not finite. Then `skipped_updates` is 1, and weights, moments, step count
  and with it the schedule stay as they were.

  Args:
    state: the state to update.
    grads: gradient of the loss by `state.params`.
    loss: the loss.
    settings: the optimizer's hyperparameters.
    total_steps: updates in the whole run, for the schedule.
    enabled: whether to learn from this batch; may be an array.
  """
  optimizer = make_optimizer(settings, total_steps)
  # An update at a learning rate of 5e-7 is far below a bfloat16 ulp of its weight.
  grads, params = _widen(grads), _widen(state.params)
  grad_norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, params)
  params = optax.apply_updates(params, updates)
  # An update may overflow although loss and gradient are finite.
  weight_norm = optax.tree.norm(params)
  # The state is donated and metrics are read a step late: the decision must be made in the step.
  is_applied = enabled & jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(weight_norm)
  params = _round_like(params, state.params, state.seed, state.step)
  updated = TrainState(state.step + 1, params, opt_state, state.seed)
  # Selected, not multiplied by 0: 0 times NaN is NaN.
  state = jax.tree.map(lambda new, old: jnp.where(is_applied, new, old), updated, state)
  return sharding.constrain_tree(state), Metrics(
    mean={'grad_norm': grad_norm, 'weight_norm': weight_norm},
    sum={'skipped_updates': 1 - is_applied.astype(jnp.int32)},
  )
