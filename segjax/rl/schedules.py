"""Learning rate as a function of the step.

Not here: the optimizer that reads it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def warmup_cosine(
  step: ScalarLike,
  *,
  peak: float,
  total_steps: int,
  warmup_steps: int,
  min_ratio: float = 0.1,
) -> Float[Array, '']:
  """Linear warm-up from 0 to the peak, then half a cosine down to min_ratio · peak.

  step ≤ W:  peak · step / W
  after:     peak · (m + (1 − m) · ½ (1 + cos π x)),  x = (step − W) / (N − W)

  Same as transformers' 'cosine_with_min_lr' up to N; past N the rate stays at its minimum instead
  of rising again.

  Args:
    step: how many updates were made before this one.
    peak: highest rate.
    total_steps: N, updates in the whole run.
    warmup_steps: W; 0 starts at the peak.
    min_ratio: m, the last rate as a fraction of the peak.
  """
  step = jnp.asarray(step, float)
  warmup = step / max(warmup_steps, 1)
  progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
  cosine = min_ratio + (1 - min_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
  return peak * jnp.where(step < warmup_steps, warmup, cosine)
