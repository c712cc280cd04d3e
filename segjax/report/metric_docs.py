"""Describes every metric: what it is, which values are healthy, and what to do about others.

The names of an entry may be patterns: * stands for any text.
"""

import fnmatch
import textwrap

from segjax.config import renamed
from segjax.errors import UserError
from segjax.report.metric_entry import Entry
from segjax.report.training_metric_docs import TRAINING_ENTRIES

ENTRIES = (
  Entry(
    ('objective/reward',),
    'dense reward of a response: the sum over its tokens, before KL',
    'rises, then levels off',
    'flat: check `reward/segment_mean`, raise the learning rate; rises alone: see `eval/*`',
  ),
  Entry(
    ('objective/lm_reward',),
    'the part of it that `reward_shaping.lm_reward` gives; with kind=teacher, coef=1 and without a '
    'clip minus KL(π ‖ teacher), nats',
    'rises',
    'flat while the reward rises: raise `reward_shaping.lm_reward.coef`',
  ),
  Entry(
    ('objective/reward_std',),
    'standard deviation of that reward over the responses of a rollout',
    'well above 0',
    '0: all responses earn the same; check the reward model or `reward_shaping.reward_fn`',
  ),
  Entry(
    ('objective/rlhf_reward', 'objective/non_score_reward'),
    'what PPO maximises: reward minus `kl_coef` · KL; the KL term alone',
    'rises',
    'falls while the reward rises: lower `ppo.kl_coef`',
  ),
  Entry(
    ('objective/scores',),
    'mean raw score of the reward model at segment ends, before the normaliser',
    'rises slowly',
  ),
  Entry(
    ('objective/kl', 'objective/kl_coef'),
    'Σ (log π − log π_ref) over a response, nats; the present coefficient',
    '0 at step 1, later at most some tens',
    'high: raise `ppo.kl_coef` or set `ppo.kl_target`; negative: sampling is filtered',
  ),
  Entry(
    ('objective/kl_token_max',),
    'largest |log π − log π_ref| of a token, nats',
    'below 10',
    'a token diverges: lower `reward_shaping.reward_clip`',
  ),
  Entry(
    ('objective/entropy',),
    'Σ −log π over a response, nats, as in TRL',
    'falls slowly',
    'near 0: raise `ppo.kl_coef` or `ppo.entropy_coef`',
  ),
  Entry(
    ('objective/ref_entropy',),
    'entropy of the reference, whose peaks segment; mean over tokens, nats',
    'steady',
  ),
  Entry(
    ('reward/segment_mean', 'reward/token_abs_max'),
    'mean reward of a segment; largest absolute reward of a token; before KL and clipping',
    'around 0 at the start',
    'large: the normaliser does not fit this policy; run `configs/normalizer.py` again',
  ),
  Entry(
    ('reward/clipped',),
    'share of the rewards other than 0 that are larger than `reward_shaping.reward_clip`',
    'below 0.01',
    'larger: raise `reward_clip`, or lower `reward_fn_weight` or `reward_model_weight`',
  ),
  Entry(
    ('reward/part/*',),
    'with `rewards`: what a source adds to a response, before penalties and KL; names are those of '
    'the lines, and reward_model, reward_fn, lm_reward, disagreement',
    'all of one size; all rise',
    'one falls while the others rise: raise its weight in `rewards`',
  ),
  Entry(
    ('reward/disagreement',),
    'with two or more reward models: standard deviation of their normalised scores z of a segment, '
    'mean over segments',
    'steady; below 1',
    'grows: they are exploited; set `reward_shaping.disagreement_coef`, or raise `ppo.kl_coef`',
  ),
  Entry(
    ('reward/failed_calls',),
    'calls of `reward_shaping.reward_fn` and of functions in `rewards` for a response whose last '
    'attempt failed, with reward_fn_on_error=zero',
    '0',
    'above 0: raise `reward_fn_timeout` or `reward_fn_retries`; the console names the first',
  ),
  Entry(
    ('reward/by_position/*',),
    'mean normalised score z of the segments in the k-th tenth of a response',
    'the same for all k at the start',
    'differs: the normaliser does not fit; run `configs/normalizer.py`',
  ),
  Entry(
    ('objective/advantage_abs_max', 'critic/return_abs_max'),
    'largest absolute advantage, after whitening, and return of a token',
    'below 30; steady',
    'grows: a token outweighs all others; lower `reward_shaping.reward_clip` or use k1',
  ),
  Entry(
    ('response/length_mean', 'response/length_max'),
    'tokens of a response',
    'at most twice those at the start',
    'set `reward_shaping.length_penalty` or lower `rollout.max_new_tokens`',
  ),
  Entry(
    ('response/eos_rate',),
    'share of responses that end with a stop token',
    'above 0.9',
    'raise `rollout.max_new_tokens`, or set `reward_shaping.missing_eos_penalty`',
  ),
  Entry(
    ('segments/per_response', 'segments/length_mean', 'segments/one_token'),
    'segments of a response; tokens of a segment; segments of a response that are one token',
    'several tokens per segment',
    'one segment per response or per token: set `reward.threshold_search`',
  ),
  Entry(
    ('policy/loss', 'policy/entropy', 'policy/learned_share'),
    'clipped surrogate loss; entropy of the policy at the trained tokens, nats; share of these',
    'loss around 0; entropy falls slowly',
    'entropy near 0: raise `ppo.kl_coef`',
  ),
  Entry(
    ('policy/approx_kl', 'policy/clipfrac', 'policy/dual_clipfrac'),
    'KL(π_old ‖ π) within an update, nats per token; share of tokens at the clip',
    'below 0.05; below 0.2',
    'larger: lower the learning rate or `ppo.num_ppo_epochs`',
  ),
  Entry(
    ('policy/ratio_mean', 'policy/ratio_max_deviation', 'policy/initial_ratio_deviation'),
    'π / π_old: mean; largest deviation from 1; that before the first update, of its own tokens',
    'the last below 1e-5 in float32, 0.1 in bfloat16 with `ppo.packing_length`, else about 1',
    'larger: sampling and training disagree; run `configs/selfcheck.py`',
  ),
  Entry(
    ('policy/importance_mean', 'policy/importance_clipfrac'),
    'weights π_old / π drawn from, with `ppo.importance_clip`: mean; share of tokens beyond it',
    '0.9 to 1; below 0.01',
    'far from it: draw from nearer the policy, `rollout.temperature=1`, `top_p=1`, `top_k=0`',
  ),
  Entry(
    ('policy/kl',),
    'KL to the reference in the loss, with `ppo.kl_placement=loss`',
    'as objective/kl',
  ),
  Entry(
    ('*/grad_norm', '*/weight_norm'),
    'norm of the gradient before clipping; norm of the weights',
    'steady',
    'spikes: lower the learning rate or `max_grad_norm`',
  ),
  Entry(
    ('critic/loss', 'critic/error', 'critic/mean', 'critic/return_mean', 'critic/clipfrac'),
    'critic: loss; |V − R|; mean of V; mean of R; share of tokens at the value clip',
    'falls; V follows R',
    'V does not follow R: raise the learning rate of the critic or `critic.warmup_rollouts`',
  ),
  Entry(
    ('critic/explained_variance',),
    '1 − Var(R − V) / Var(R)',
    'above 0, rising to 1',
    'below 0: set `critic.warmup_rollouts`, `critic.init=reward_model`',
  ),
  Entry(
    ('rollout/logprob_mismatch', 'rollout/logprob_mismatch_max'),
    '|log-prob when sampled − log-prob unfiltered at temperature 1|, nats per token: mean; maximum',
    '0 for plain sampling; some hundredths in bfloat16',
    'larger: set `rollout.temperature=1`, `top_p=1`, `top_k=0`, or `ppo.importance_clip=2`',
  ),
  Entry(
    ('rollout/carried_responses', 'rollout/carried_tokens'),
    'with `rollout.carry`: responses that a step has from the one before; their tokens',
  ),
  Entry(
    ('rollout/older_share', 'rollout/age_mean', 'rollout/age_max'),
    'with `rollout.carry`: share of tokens that older policies drew; age in steps: mean; maximum',
    'below 0.6; `rollout.max_concurrent` / `ppo.rollout_batch_size`; a few steps',
    'larger: lower `rollout.max_concurrent` or `rollout.max_new_tokens`',
  ),
  Entry(
    ('eval/reward', 'eval/gold', 'eval/kl', 'eval/length_mean'),
    'the same on held-out prompts, every `ppo.eval_every` steps; gold is `evaluate.gold_reward_fn`',
    'rises with objective/reward',
    'falls: the reward model is exploited; use `checkpoint.best_metric=eval/reward`',
  ),
  *TRAINING_ENTRIES,
  Entry(
    ('timing/compile',),
    'seconds of a step in which the devices waited for programs to be traced and compiled; in no '
    'other timing/*',
    '0 after the first steps',
    'above 0: see perf/num_compiles',
  ),
  Entry(
    ('timing/*',),
    'seconds of a step, from the completion of the one before, and of its parts; between_steps is '
    'what is spent outside of them',
    'generate 0.3 to 0.7 of step',
    'between_steps is large: the data or the disk is slow',
  ),
  Entry(
    ('perf/tokens_per_second', 'perf/mfu'),
    'tokens per second, without padding; model FLOPs as a share of the peak, on listed chips; '
    'neither counts compiling and evaluations',
    'steady',
    'slow: set `*.packing_length` or `rollout.max_concurrent`, raise `micro_batch_*`',
  ),
  Entry(
    ('perf/num_compiles', 'perf/peak_memory_gib', 'perf/packing_efficiency'),
    'programs compiled so far; peak memory of a device; share of packed tokens without padding',
    'constant after the first steps',
    'num_compiles grows at every step: shapes change; please report it',
  ),
  Entry(
    ('skipped_updates',),
    'skipped updates: not finite, or beyond `ppo.skip_if_kl_above` or `ppo.skip_if_reward_above`',
    '0',
    'lower the learning rate',
  ),
)


def find_entry(name: str) -> Entry | None:
  """Returns the entry of a metric; None if there is none."""
  for entry in ENTRIES:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in entry.names):
      return entry
  return None


def plain_text(name: str = '', width: int = 100) -> str:
  """Renders entries as text for a terminal.

  Args:
    name: a metric or a pattern such as eval/*; '' renders all.
    width: columns.

  Raises:
    UserError: no metric has that name; the message gives the present name if it was renamed.
  """
  renamed.check_metric(name, 'metrics ')
  entries = [entry for entry in ENTRIES if _matches(entry, name or '*')]
  if not entries:
    raise UserError(f'metrics {name}: there is no such metric; `segjax metrics` lists all.')
  lines = []
  for entry in entries:
    lines.append(', '.join(entry.names))
    parts = (('', entry.description), ('healthy: ', entry.healthy), ('unhealthy: ', entry.remedy))
    for label, text in parts:
      if text:
        wrapped = textwrap.wrap(label + text.replace('`', ''), width - 4)
        lines += [f'    {line}' for line in wrapped]
  return '\n'.join(lines)


def _matches(entry: Entry, name: str) -> bool:
  """Returns whether a name or pattern matches any of an entry's names or patterns."""
  return any(
    fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(pattern, name)
    for pattern in entry.names
  )
