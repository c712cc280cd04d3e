"""What `reference_exact` switches on: the numbers of the published code, mistakes included.

The code is https://github.com/yinyueqin/DenseRewardRLHF-PPO at commit 6cb62e6. What every run of it
shares is segjax's default anyway; here is what segjax does differently unless asked.
"""

import dataclasses

from segjax.config.settings import Compat, Segmentation, Settings, replace
from segjax.errors import UserError


def apply_reference_exact(settings: Settings) -> Settings:
  """The settings with every compatibility switch on and the fixes of `rl` off.

  `Compat` lists the switches. Besides them: tokens are segments of threshold 0, so that tokens of
  entropy exactly 0 merge with what follows; Std(p) has no floor; all bins of p weigh alike; old
  log-probs are recomputed, for the forced stop token was never sampled.

  Raises:
    ValueError: a setting asks for what the published code cannot do.
  """
  s = settings
  for key, value, published in (
    (
      'reward_shaping.missing_eos_penalty',
      s.reward_shaping.missing_eos_penalty,
      ('off', 'per_token'),
    ),
    ('reward_shaping.length_penalty', s.reward_shaping.length_penalty, ('off', 'threshold')),
    ('normalizer.weighting', s.normalizer.weighting, ('bin',)),
    ('normalizer.min_bin_count', s.normalizer.min_bin_count, (1,)),
  ):
    if value not in published:
      known = ' or '.join(map(str, published))
      raise UserError(
        f'config.{key}={value!r} is not what the published code does ({known}); change it, or set '
        'config.reference_exact=False.'
      )
  switches = {f.name: True for f in dataclasses.fields(Compat) if f.type is bool}
  return replace(
    s,
    compat=dataclasses.replace(s.compat, **switches),
    **{
      'reward.segmentation': _tokens_by_threshold(s.reward.segmentation),
      'reward_model.segmentation': _tokens_by_threshold(s.reward_model.segmentation),
      'reward_shaping.std_floor_ratio': -1.0,
      'rollout.recompute_logprob': True,
    },
  )


def _tokens_by_threshold(segmentation: Segmentation) -> Segmentation:
  if segmentation.granularity != 'token':
    return segmentation
  return dataclasses.replace(segmentation, granularity='segment', entropy_threshold=0.0)
