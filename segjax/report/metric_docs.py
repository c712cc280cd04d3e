"""What every metric means, what is healthy, and what to do when it is not; README's table is this.

Names that end in * stand for all that begin so.
"""

import dataclasses
import fnmatch
import textwrap

from segjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
  """A metric, or several that are read together."""

  names: tuple[str, ...]
  meaning: str
  healthy: str = ''
  remedy: str = ''


_INDENT = {'initial_indent': '    ', 'subsequent_indent': '    '}
_UPDATE_SIZE = 'lower the learning rate'

ENTRIES = (
  Entry(
    ('objective/reward',),
    'dense reward of a response: the sum over its tokens, before KL',
    'rises, then levels off',
    'flat: look at `reward/segment_mean`, raise the learning rate; rising alone: see `eval/*`',
  ),
  Entry(
    ('objective/rlhf_reward', 'objective/non_score_reward'),
    'what PPO maximises: reward less `kl_coef` · KL; the second is the KL part alone',
    'rises',
    'falls while reward rises: lower `ppo.kl_coef`',
  ),
  Entry(
    ('objective/scores',),
    'mean raw score of the reward model at segment ends, before the normaliser',
    'rises slowly',
  ),
  Entry(
    ('objective/kl', 'objective/kl_coef'),
    'Σ (log π − log π_ref) over a response, nats; the coefficient in force',
    '0 at step 1, then up to some tens',
    'high: raise `ppo.kl_coef` or set `ppo.kl_target`; below 0: sampling is filtered',
  ),
  Entry(
    ('objective/kl_token_max',),
    'largest |log π − log π_ref| of a token',
    'below 10',
    'one token runs away: lower `reward_shaping.reward_clip`',
  ),
  Entry(
    ('objective/entropy', 'objective/ref_entropy'),
    '−log π of the tokens drawn; entropy of the reference on them (which cuts segments), nats',
    'falls slowly',
    'near 0: raise `ppo.kl_coef` or `ppo.entropy_coef`',
  ),
  Entry(
    ('reward/segment_mean', 'reward/token_abs_max'),
    'mean reward of a segment; largest size of a token’s reward, before KL and clip',
    'around 0 at first',
    'large: the normaliser does not fit this policy, fit it anew',
  ),
  Entry(
    ('reward/by_position/*',),
    'mean reward of segments in the k-th tenth of a response',
    'level over k at first',
    'slanted: the normaliser does not fit; run `configs/normalizer.py`',
  ),
  Entry(
    ('response/length_mean', 'response/length_max'),
    'tokens of a response',
    'within twice the start',
    '`reward_shaping.length_penalty`, `rollout.max_new_tokens`',
  ),
  Entry(
    ('response/eos_rate',),
    'share of responses that end by themselves',
    'above 0.9',
    '`rollout.max_new_tokens`, `reward_shaping.missing_eos_penalty`',
  ),
  Entry(
    ('segments/per_response', 'segments/length_mean'),
    'segments of a response; tokens of a segment',
    'some tokens to a segment',
    'one segment, or one token each: `reward.threshold_search`',
  ),
  Entry(
    ('policy/loss', 'policy/entropy'),
    'clipped surrogate loss; entropy of the policy on the tokens trained, nats',
    'loss around 0; entropy falls slowly',
    'entropy near 0: raise `ppo.kl_coef`',
  ),
  Entry(
    ('policy/approx_kl', 'policy/clipfrac', 'policy/dual_clipfrac'),
    'KL(π_old ‖ π) within an update, nats a token; share of tokens at the clip',
    'below 0.05; below 0.2',
    f'{_UPDATE_SIZE} or `ppo.num_ppo_epochs`',
  ),
  Entry(
    ('policy/ratio_mean', 'policy/ratio_max_deviation', 'policy/initial_ratio_deviation'),
    'π / π_old: mean, largest distance from 1, and that before the first update',
    'the last one 1e-5 in float32, below 0.3 in bfloat16',
    'else sampling and training disagree: run `configs/selfcheck.py`',
  ),
  Entry(
    ('policy/kl',),
    'KL to the reference in the loss, with `ppo.kl_placement=loss`',
    'as objective/kl',
  ),
  Entry(
    ('*/grad_norm', '*/weight_norm'),
    'norms of the gradient before clipping, and of the weights',
    'steady',
    f'spikes: {_UPDATE_SIZE} or `max_grad_norm`',
  ),
  Entry(
    ('critic/loss', 'critic/error', 'critic/mean', 'critic/return_mean', 'critic/clipfrac'),
    'critic: loss, |V − R|, means of V and R, share at the value clip',
    'falls; V follows R',
    'raise the critic’s learning rate or `critic.warmup_rollouts`',
  ),
  Entry(
    ('critic/explained_variance',),
    '1 − Var(R − V) / Var(R)',
    'above 0, towards 1',
    'below 0: `critic.warmup_rollouts`, `critic.init=reward_model`',
  ),
  Entry(
    ('rollout/logprob_mismatch', 'rollout/logprob_mismatch_max'),
    '|log-prob as drawn − at temperature 1, unfiltered|, nats a token',
    '0 for plain sampling',
    '`rollout.temperature=1`, `top_p=1`, `top_k=0`',
  ),
  Entry(
    ('eval/reward', 'eval/gold', 'eval/kl', 'eval/length_mean'),
    'the same on held-out prompts, every `ppo.eval_every` steps; gold is `evaluate.gold_reward_fn`',
    'rises with objective/reward',
    'falls: the reward model is exploited; keep `checkpoint.best_metric=eval/reward`',
  ),
  Entry(
    ('eval/accuracy', 'eval/loss', 'eval/margin', 'eval/length_baseline_accuracy', 'eval/ece'),
    'reward model on held-out pairs, every `reward.eval_every` steps',
    'accuracy above length_baseline_accuracy',
    'falls while train/accuracy rises: fewer epochs',
  ),
  Entry(
    ('train/loss', 'train/entropy'),
    'SFT: nats a token; reward model: Bradley-Terry loss, ln 2 at first',
    'falls',
    f'rises: {_UPDATE_SIZE}',
  ),
  Entry(
    ('train/accuracy', 'train/margin', 'train/segments'),
    'reward model: chosen scores higher; mean lead; segments of a response',
    'accuracy 0.65 to 0.8 on human pairs',
    '0.5: learning rate, template, or pairs that are noise',
  ),
  Entry(
    ('timing/*',),
    'seconds of a step and of its parts; wait is the time between two',
    'generate 0.3 to 0.7 of step',
    'wait: the data or the disk is slow',
  ),
  Entry(
    ('perf/tokens_per_second', 'perf/mfu'),
    'real tokens a second; model FLOPs as a share of the chips’ peak, where that is known',
    'steady',
    '`*.packing_length`, `rollout.max_concurrent`, a larger `micro_batch_size`',
  ),
  Entry(
    ('perf/num_compiles', 'perf/peak_memory_gib', 'perf/packing_efficiency'),
    'programs compiled so far; peak of a device; share of packed tokens that are real',
    'compiles flat after the first steps',
    'compiles grow: shapes change, report it',
  ),
  Entry(
    ('skipped_updates',),
    'updates left out: not finite, or beyond `ppo.skip_if_kl_above` or `ppo.skip_if_reward_above`',
    '0',
  ),
)


def find_entry(name: str) -> Entry | None:
  """What is known of a metric."""
  for entry in ENTRIES:
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in entry.names):
      return entry
  return None


def plain_text(name: str = '') -> str:
  """Returns all entries, or those of one metric, as text for the console.

  Raises:
    UserError: no entry has that name.
  """
  entries = ENTRIES if not name else [entry for entry in ENTRIES if entry == find_entry(name)]
  if not entries:
    raise UserError(f'metrics {name}: there is no such metric; `segjax metrics` lists all.')
  lines = []
  for entry in entries:
    lines.append(', '.join(entry.names))
    parts = (entry.meaning, entry.healthy and f'healthy: {entry.healthy}', entry.remedy)
    lines += [textwrap.fill(part, 96, **_INDENT) for part in parts if part]
  return '\n'.join(lines)


def markdown() -> str:
  """All entries as a Markdown table."""
  lines = ['| metric | what it is | healthy | when it is not |', '|---|---|---|---|']
  for entry in ENTRIES:
    names = ', '.join(f'`{name}`' for name in entry.names)
    cells = (names, entry.meaning, entry.healthy, entry.remedy)
    lines.append(f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in cells)} |')
  return '\n'.join(lines)
