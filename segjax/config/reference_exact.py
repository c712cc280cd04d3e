"""The settings of `reference_exact`: those that reproduce the published code, mistakes included.

The code is https://github.com/yinyueqin/DenseRewardRLHF-PPO at commit 6cb62e6. Settings
that all its runs share are defaults of segjax already; here are those in which segjax differs.
"""

import dataclasses
from operator import attrgetter
from typing import Any

from segjax.config.choices import OPTIMIZERS
from segjax.config.settings import Compat, Settings, replace
from segjax.errors import UserError


def apply_reference_exact(settings: Settings) -> Settings:
  """Returns the settings with every switch of `Compat` on and the fixes of `rl` off.

  In addition, tokens are segments of threshold 0, so that tokens of entropy exactly 0 merge with
  the next token; Std(p) has no floor; all bins of p have equal weight; old log-probs are
  recomputed, because the forced stop token was never sampled; logits are rounded to the compute
  dtype.

  Raises:
    UserError: a setting asks for what the published code cannot do.
  """
  s = settings
  for key, published in (
    ('reward_shaping.missing_eos_penalty', ('off', 'per_token')),
    ('reward_shaping.length_penalty', ('off', 'threshold')),
    ('normalizer.min_bin_count', (1,)),
  ):
    value = attrgetter(key)(s)
    if value not in published:
      listed = ' or '.join(map(str, published))
      raise UserError(
        f'config.{key}={value!r} is not what the published code does ({listed}); change it, or set '
        'config.reference_exact=False.'
      )
  switches = {f.name: True for f in dataclasses.fields(Compat) if f.type is bool}
  return replace(
    s,
    compat=dataclasses.replace(s.compat, **switches),
    **{
      'reward.segmentation': _tokens_by_threshold(s.reward.segmentation),
      'reward_model.segmentation': _tokens_by_threshold(s.reward_model.segmentation),
      'normalizer.weighting': 'uniform',
      'reward_shaping.std_floor_ratio': 0.0,
      'rollout.recompute_logprob': True,
      'runtime.round_logits': True,
      # With a weight_decay other than the published 0.
      **{f'{optimizer}.decayed_weights': 'matrices' for optimizer in OPTIMIZERS},
    },
  )


def _tokens_by_threshold(segmentation: Any) -> Any:
  if segmentation.granularity != 'token':
    return segmentation
  return dataclasses.replace(segmentation, granularity='segment', entropy_threshold=0.0)
