"""Checks for settings that contradict each other; each message gives the fix.

Single values are checked by `validate`. Jobs check again once a stored reward model is read.
"""

from segjax.config.settings import (
  LMReward,
  RewardModelSettings,
  Segmentation,
  SegmentationOverrides,
  Settings,
)
from segjax.errors import UserError
from segjax.rl import normalizer
from segjax.rl.cuts import CUTS

# Boundaries that the threshold of the entropy decides.
_BY_ENTROPY = tuple(name for name, cut in CUTS.items() if cut.signal == 'entropy')


def check_conflicts(s: Settings) -> None:
  """Raises UserError if two settings contradict each other."""
  _check_threshold_search(s)
  for section in ('reward', 'reward_model'):
    check_segmentation(getattr(s, section).segmentation, f'config.{section}.segmentation')
  _check_score_jump(s)
  granularity = s.reward.segmentation.granularity if 'reward' in s.stages else ''
  granularity = s.reward_model.segmentation.granularity or granularity
  if 'normalizer' in s.stages:
    check_normalizer(s.normalizer.kind, granularity, 'config.normalizer.kind')
  name = s.reward_model.normalizer
  if name.startswith('published:') and normalizer.PUBLISHED[name.partition(':')[2]].w_mean:
    check_normalizer('regression', granularity, f'config.reward_model.normalizer={name}:')
  check_redistribution(s, granularity)
  check_segments(s, granularity)
  _check_importance(s)
  _check_carry(s)
  _check_estimator(s)
  if s.ppo.kl_placement == 'loss' and s.ppo.kl_estimator == 'k1':
    raise UserError(
      'config.ppo.kl_placement=loss with kl_estimator=k1: its gradient is 0 on average; set '
      'config.ppo.kl_estimator=k2 or k3, or kl_placement=reward.'
    )
  if bool(s.ppo.eval_every) != bool(s.ppo.holdout_fraction):
    raise UserError(
      f'config.ppo.eval_every={s.ppo.eval_every} and '
      f'ppo.holdout_fraction={s.ppo.holdout_fraction} must be set together: '
      'how often held-out prompts are sampled, and the share held out, such as 0.05.'
    )
  if s.sft.eval_every and not s.sft.holdout_fraction:
    raise UserError(
      f'config.sft.eval_every={s.sft.eval_every} needs held-out conversations; set '
      'config.sft.holdout_fraction to a share such as 0.02.'
    )
  check_samples(s.rollout.samples_per_prompt, s.rollout.max_concurrent)
  if s.compat.first_row_attention_mask and s.ppo.packing_length:
    raise UserError(
      'config.compat.first_row_attention_mask masks padded rows, and config.ppo.packing_length '
      'packs them; set one of them to False or 0.'
    )
  _check_rewards(s)
  check_reading(s.reward_model, 'config.reward_model.')


def check_reading(model: RewardModelSettings, key: str) -> None:
  """Raises UserError if what is said of how a reward model is read contradicts itself.

  Args:
    model: of config.reward_model, or of a line of config.rewards.
    key: what errors write in front of the name of a setting, such as 'config.reward_model.'.
  """
  if model.step_tag and model.reads == 'tokens':
    raise UserError(
      f'{key}step_tag={model.step_tag!r} is put into text, and reads=tokens gives the reward model '
      'the policy’s tokens; set reads=text.'
    )
  if model.step_delimiter is not None and not model.step_tag:
    raise UserError(
      f'{key}step_delimiter={model.step_delimiter!r} has no effect without step_tag, which it '
      'stands behind; set both, or neither.'
    )
  for name in ('positive', 'negative'):
    if getattr(model, name) and model.head == 'scalar':
      raise UserError(
        f'{key}{name}={getattr(model, name)!r} has no effect with head=scalar; set head=labels or '
        'tokens.'
      )


def _check_rewards(s: Settings) -> None:
  """Checks that there is a reward, and that a language model that rewards has an effect."""
  shaping, lm, key = s.reward_shaping, s.reward_shaping.lm_reward, 'config.reward_shaping.lm_reward'
  if lm.kind == 'off':
    if not shaping.reward_model_weight and not shaping.reward_fn and not s.rewards:
      raise UserError(
        'config.reward_shaping.reward_model_weight=0 leaves no reward; name a '
        f'config.reward_shaping.reward_fn, or set {key}.kind.'
      )
    for name, value in vars(lm).items():
      if value != getattr(LMReward(), name):
        raise UserError(
          f'{key}.{name}={value} has no effect with kind=off; set {key}.kind=implicit or teacher, '
          f'or leave {name} out.'
        )
    return
  if not lm.coef:
    raise UserError(f'{key}.coef=0 makes all rewards of the model 0; set it, or kind=off.')
  reference = s.reference.path or s.policy.path
  if lm.kind == 'implicit' and lm.path and lm.path == reference:
    raise UserError(
      f'{key}.path={lm.path!r} is the reference too, so that all its rewards are 0; name the model '
      'that was trained from it, or another config.reference.path.'
    )


def _check_threshold_search(s: Settings) -> None:
  """Checks that there is one target, and a threshold to look for."""
  search, segmentation = s.reward.threshold_search, s.reward.segmentation
  if search.target_segment_length and search.entropy_quantile:
    raise UserError(
      'config.reward.threshold_search has both target_segment_length and entropy_quantile; '
      'set one of them to 0.'
    )
  if search.target_segment_length or search.entropy_quantile:
    for key, value, needed in (
      ('granularity', segmentation.granularity, ('segment',)),
      ('boundary', segmentation.boundary, _BY_ENTROPY),
    ):
      if value not in needed:
        raise UserError(
          'config.reward.threshold_search looks for an entropy threshold, which '
          f'{key}={value} does not use; '
          f'set config.reward.segmentation.{key}={needed[0]}, or both targets to 0.'
        )


def check_samples(samples: int, max_concurrent: int, section: str = 'config.rollout.') -> None:
  """Raises UserError if a prompt has more responses than are decoded at once."""
  if 0 < max_concurrent < samples:
    raise UserError(
      f'{section}samples_per_prompt={samples} is more than {section}max_concurrent='
      f'{max_concurrent}: responses to a prompt are decoded together, and share its keys and '
      f'values; set {section}max_concurrent to {samples} or more, or to 0.'
    )


def _check_importance(s: Settings) -> None:
  """Checks that old log-probs are those of the trained policy, and that weights can be had."""
  clip = s.ppo.importance_clip
  if s.rollout.recompute_logprob is False and s.rollout.weights_dtype == 'int8':
    raise UserError(
      'config.rollout.recompute_logprob=False leaves PPO without the log-probs of the trained '
      'policy: those of decoding with config.rollout.weights_dtype=int8 are of rounded weights; '
      'set config.rollout.recompute_logprob=None.'
    )
  if not clip:
    return
  if s.rollout.recompute_logprob is False and s.runtime.compute_dtype == 'bfloat16':
    raise UserError(
      f'config.rollout.recompute_logprob=False leaves config.ppo.importance_clip={clip} without '
      'the log-probs of the trained policy, which decoding in bfloat16 rounds; set '
      'config.rollout.recompute_logprob=None.'
    )
  if s.compat.force_eos:
    raise UserError(
      f'config.ppo.importance_clip={clip} weighs tokens by the log-probs they were drawn with, and '
      'config.compat.force_eos puts in tokens that were not drawn; set one of them to 0 or False.'
    )


def _check_carry(s: Settings) -> None:
  if s.rollout.carry and s.rollout.samples_per_prompt > 1:
    raise UserError(
      f'config.rollout.samples_per_prompt={s.rollout.samples_per_prompt} with rollout.carry=True: '
      'responses to one prompt would end in different steps, where nothing can compare them; set '
      'config.rollout.samples_per_prompt=1, or carry=False.'
    )


def _check_estimator(s: Settings) -> None:
  """Checks that an estimator without a critic has something to compare a response with."""
  estimator = s.ppo.estimator
  if s.ppo.has_critic or 'ppo' not in s.stages:
    return
  if estimator == 'reinforce_plus_plus':
    if not s.ppo.whiten:
      raise UserError(
        'config.ppo.estimator=reinforce_plus_plus with whiten=False has no baseline; set '
        'config.ppo.whiten=True, or another estimator.'
      )
  elif s.rollout.samples_per_prompt < 2:
    raise UserError(
      f'config.ppo.estimator={estimator} compares the responses to a prompt, and '
      f'config.rollout.samples_per_prompt={s.rollout.samples_per_prompt}; set it to 2 or more.'
    )


def _check_score_jump(s: Settings) -> None:
  """Checks that boundaries that read a reward model's scores have one that is trained."""
  if s.reward.segmentation.boundary == 'score_jump':
    raise UserError(
      'config.reward.segmentation.boundary=score_jump cuts where the score of a trained reward '
      'model jumps, and there is none before training; use another boundary here, and score_jump '
      'as config.reward_model.segmentation.boundary.'
    )
  if s.reward_model.segmentation.boundary == 'score_jump' and (
    not s.reward_shaping.reward_model_weight
  ):
    raise UserError(
      'config.reward_model.segmentation.boundary=score_jump cuts by the score of a reward model, '
      'which config.reward_shaping.reward_model_weight=0 leaves out; use another boundary.'
    )


def check_segmentation(segmentation: Segmentation | SegmentationOverrides, key: str) -> None:
  """Raises UserError if a setting of boundaries is missing, or changed where it is not used."""
  boundary, path = segmentation.boundary, segmentation.boundary_fn
  if boundary == 'function' and path == '':
    raise UserError(
      f"{key}: boundary=function needs a function of a token's text; set "
      "boundary_fn='module:function'."
    )
  if path and boundary not in (None, 'function'):
    raise UserError(
      f'{key}: boundary_fn={path!r} has no effect with boundary={boundary}; set '
      'boundary=function, or empty it.'
    )
  if segmentation.granularity not in ('token', 'bandit'):
    return
  for name, default in (('boundary', 'entropy'), ('min_segment_length', 1)):
    value = getattr(segmentation, name)
    if value and value != default:
      raise UserError(
        f'{key}: {name}={value} has no effect with granularity={segmentation.granularity}; '
        f'set granularity=segment, or {name}={default}.'
      )


def check_normalizer(kind: str, granularity: str, key: str) -> None:
  """Raises UserError if the kind needs more than one segment per response."""
  if granularity == 'bandit' and kind in ('regression', 'last'):
    raise UserError(
      f'{key} {kind} depends on the position of a segment in the response, and '
      'granularity=bandit has one segment; use scalar.'
    )


def check_segments(s: Settings, granularity: str) -> None:
  """Raises UserError if a setting of PPO needs several segments or rewards, and there is one."""
  if s.ppo.learn_on == 'segment_starts' and granularity == 'bandit':
    raise UserError(
      'config.ppo.learn_on=segment_starts leaves the first token of each response, since '
      'granularity=bandit has one segment; set config.ppo.learn_on=all or high_ref_entropy.'
    )
  if s.reward_shaping.credit == 'min' and 'bandit' in (granularity, s.reward_shaping.spread):
    raise UserError(
      'config.reward_shaping.credit=min weighs the segments of a response against each other, and '
      'bandit has one reward; set config.reward_model.segmentation.granularity=token or segment '
      'and reward_shaping.spread=auto, or credit=sum.'
    )


def check_redistribution(s: Settings, granularity: str, w_mean: float = 0.0) -> None:
  """Raises UserError if differences of the score would not sum to the score of the response."""
  how = s.reward_shaping.redistribute
  if how == 'none':
    return
  if how == 'red' and s.reward_model.step_tag:
    raise UserError(
      f'config.reward_shaping.redistribute=red takes differences of the score of a text, and '
      f'config.reward_model.step_tag={s.reward_model.step_tag!r} reads scores of steps; use none.'
    )
  if granularity == 'bandit' or s.reward_shaping.spread == 'bandit':
    raise UserError(
      f'config.reward_shaping.redistribute={how} distributes one score over segments, and bandit '
      'has one; set config.reward_model.segmentation.granularity=token or segment, and '
      'reward_shaping.spread=auto.'
    )
  if w_mean:
    raise UserError(
      f'config.reward_shaping.redistribute={how} takes parts of one score, which a normalizer '
      'by position would change from segment to segment; use '
      'config.reward_model.normalizer=none, or a scalar one.'
    )
