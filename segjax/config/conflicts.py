"""Settings that cannot be meant together; each message gives the way out.

Whether a value is valid by itself is `checks`' business. Jobs ask again once they know what a
stored reward model says.
"""

from segjax.config.settings import Segmentation, Settings
from segjax.errors import UserError
from segjax.rl import normalizer


def check_conflicts(s: Settings) -> None:
  """ValueError where two settings cannot be meant together."""
  calibration, cutting = s.reward.threshold_search, s.reward.segmentation
  if calibration.target_segment_length and calibration.entropy_quantile:
    raise UserError(
      'config.reward.threshold_search has both target_segment_length and '
      'entropy_quantile; set one of '
      'them to 0.'
    )
  if calibration.target_segment_length or calibration.entropy_quantile:
    for key, value, needed in (
      ('granularity', cutting.granularity, 'segment'),
      ('boundary', cutting.boundary, 'entropy'),
    ):
      if value != needed:
        raise UserError(
          'config.reward.threshold_search looks for an entropy threshold, which '
          f'{key}={value} does not '
          f'use; set config.reward.segmentation.{key}={needed}, or both targets to 0.'
        )
  for section in ('reward', 'reward_model'):
    check_segmentation(getattr(s, section).segmentation, f'config.{section}.segmentation')
  granularity = cutting.granularity if 'reward' in s.stages else ''
  granularity = s.reward_model.segmentation.granularity or granularity
  if 'normalizer' in s.stages:
    check_normalizer(s.normalizer.kind, granularity, 'config.normalizer.kind')
  named = s.reward_model.normalizer
  if named.startswith('published:') and normalizer.PUBLISHED[named.partition(':')[2]].w_mean:
    check_normalizer('regression', granularity, f'config.reward_model.normalizer={named}:')
  check_redistribution(s, granularity)
  if s.ppo.kl_placement == 'loss' and s.ppo.kl_estimator == 'k1':
    raise UserError(
      'config.ppo.kl_placement=loss with kl_estimator=k1: its gradient is 0 on average; set '
      'config.ppo.kl_estimator=k2 or k3, or kl_in=reward.'
    )
  if bool(s.ppo.eval_every) != bool(s.ppo.holdout_fraction):
    raise UserError(
      f'config.ppo.eval_every={s.ppo.eval_every} and '
      f'ppo.holdout_fraction={s.ppo.holdout_fraction} go together: how '
      'often held-out prompts are sampled, and what share of them is held out, say 0.05.'
    )
  if s.compat.first_row_attention_mask and s.ppo.packing_length:
    raise UserError(
      'config.compat.first_row_attention_mask masks padded rows, and config.ppo.packing_length '
      'packs them; set '
      'one '
      'of them to False or 0.'
    )
  if not s.reward_shaping.reward_model_weight and not s.reward_shaping.reward_fn:
    raise UserError(
      'config.reward_shaping.reward_model_weight=0 leaves no reward; name a '
      'config.reward_shaping.reward_fn.'
    )


def check_segmentation(segmentation: Segmentation, key: str) -> None:
  """ValueError where a way of cutting is named that the granularity does not use."""
  if segmentation.granularity not in ('token', 'bandit'):
    return
  for name, default in (('boundary', 'entropy'), ('min_segment_length', 1)):
    value = getattr(segmentation, name)
    if value and value != default:
      raise UserError(
        f'{key}: {name}={value} says how segments are cut, and granularity='
        f'{segmentation.granularity} cuts none; set granularity=segment, or {name}={default}.'
      )


def check_normalizer(kind: str, granularity: str, key: str) -> None:
  """ValueError where the kind asks for more than one segment per response."""
  if granularity == 'bandit' and kind in ('regression', 'last'):
    raise UserError(
      f'{key} {kind} looks at where in the response a segment lies, and granularity=bandit has one '
      'segment; use scalar.'
    )


def check_redistribution(s: Settings, granularity: str, w_mean: float = 0.0) -> None:
  """ValueError where differences of the score would not add up to the whole."""
  if s.reward_shaping.redistribute == 'none':
    return
  if granularity == 'bandit' or s.reward_shaping.spread == 'bandit':
    raise UserError(
      'config.reward_shaping.redistribute=red spreads one score over segments, and bandit has '
      'one; set '
      'config.reward_model.segmentation.granularity=token or segment, and '
      'reward_shaping.spread=auto.'
    )
  if w_mean:
    raise UserError(
      'config.reward_shaping.redistribute=red takes differences of one score, which a normaliser '
      'by '
      'position would change from segment to segment; use config.reward_model.normalizer=none, or '
      'a scalar one.'
    )
