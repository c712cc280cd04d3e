"""Sections of the settings that PPO adds: rollouts, rewards, advantages, losses.

`segjax.config.settings` puts them together with the sections of everything else.
"""

import dataclasses

from segjax.config.training_settings import Optimizer, StageData


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
  """Sampling of responses."""

  temperature: float = 1.0  # 0: greedy
  top_k: int = 0  # 0: all tokens
  top_p: float = 1.0  # share of the probability that is sampled from
  min_new_tokens: int = 1  # the stop token is not sampled before
  max_new_tokens: int = 1024  # length limit of a response
  samples_per_prompt: int = 1  # responses per prompt
  max_concurrent: int = 0  # responses decoded at once; 0: as many as the memory has room for
  tensor: int = 0  # devices that decode one row together; 0: as many as divide the key heads
  weights_dtype: str = 'compute_dtype'  # of the layers in PPO's rollouts; int8: half the size
  recompute_logprob: bool | None = None  # old log-probs by a full forward; None: bfloat16 or int8
  carry: bool = False  # unfinished responses go on in the next rollout, see train/carry.py


@dataclasses.dataclass(frozen=True)
class LMReward:
  """A language model that rewards tokens, beside a reward model or alone."""

  path: str = ''  # HF directory or hub id, with the tokenizer of the policy
  kind: str = 'off'  # implicit: log π_lm - log π_ref, as of DPO; teacher: log π_lm - log π_old
  coef: float = 1.0  # reward per nat; RTO has 0.05
  clip: float = 0.0  # largest size of such a reward of a token, RTO has 0.05; 0: none
  level: str = 'token'  # segment: the sum over a segment goes through reward_shaping.spread


@dataclasses.dataclass(frozen=True)
class RewardShaping:
  """From scores to one reward per token: normalise, spread, mix, penalise, clamp."""

  spread: str = 'auto'  # auto: even_split for segment and token, bandit for bandit
  length_norm: bool = False  # divide the dense rewards by the response's length
  credit: str = 'sum'  # min: the worse a segment of a response, the more of its reward counts
  credit_temperature: float = 0.1  # of credit=min, in the unit of z; small: the worst alone
  std_floor_ratio: float = 0.01  # Std(p) is at least this times b_std; 0: no floor
  redistribute: str = 'none'  # red: a segment earns the difference of the score over it
  attention_share: float = 1.0  # of the score, with redistribute=attention; the rest at the end
  red_baseline: str = 'prompt'  # the score before the first segment
  reward_model_weight: float = 1.0  # factor of the reward model in the sum with reward_fn
  reward_fn: str = ''  # 'module:function' of (prompt, response); see train/custom_reward.py
  reward_fn_weight: float = 1.0  # factor of reward_fn
  reward_fn_concurrency: int = 0  # calls at once; 0: 64 of a coroutine function, else 1
  reward_fn_timeout: float = 0.0  # seconds of a call, in a thread that may go on; 0: no limit
  reward_fn_retries: int = 0  # further calls after one that fails, after 1, 2, 4, ... seconds
  reward_fn_on_error: str = 'stop'  # zero: a response whose last call fails has no such reward
  lm_reward: LMReward = LMReward()
  missing_eos_penalty: str = 'off'  # of unfinished responses; per_token replaces rewards
  missing_eos_penalty_value: float = -0.05  # reward of each token, or added at the end
  length_penalty: str = 'off'  # past length_threshold; threshold replaces rewards
  length_penalty_value: float = -0.05  # reward of each token, or added past the threshold
  length_threshold: int = 800  # tokens
  reward_clip: float = 10.0  # largest size of a token's reward before the KL penalty; 0: none
  mix: str = 'token'  # of several reward models; segment: all are read at the first one's segments
  disagreement_coef: float = 0.0  # of the models' spread, taken off with mix=segment; 0: none


@dataclasses.dataclass(frozen=True)
class PPO:
  """Rollouts, advantages and updates; sizes are counted in sequences."""

  max_steps: int = 59  # rollouts
  rollout_batch_size: int = 1024  # responses per rollout
  minibatch_size: int = 128  # responses per update
  micro_batch_size: int = 0  # rows at once, gradients accumulated; 0: the whole minibatch
  micro_batch_tokens: int = 0  # the same in tokens of a device; 0: micro_batch_size
  packing_length: int = 0  # tokens of a row that several sequences share; 0: one per row
  num_ppo_epochs: int = 1  # passes over each rollout
  eval_every: int = 0  # steps between two samplings of held-out prompts; 0: none
  holdout_fraction: float = 0.0  # share of the prompts never trained on, for eval_every
  scoring_batch_size: int = 0  # sequences scored at once where they are not packed; 0: all
  kl_coef: float = 0.01  # factor of the KL penalty to the reference
  kl_estimator: str = 'k1'  # of KL from the log-probs of sampled tokens
  kl_placement: str = 'reward'  # a penalty in the reward, or a term of the loss
  kl_target: float = 0.0  # nats per response that kl_coef is adapted to; 0: kl_coef is fixed
  kl_horizon: int = 10_000  # sequences over which kl_coef is adapted
  skip_if_kl_above: float = 0.0  # nats per response; no update on such a rollout; 0: off
  skip_if_reward_above: float = 0.0  # the same for a token's largest reward before clipping
  estimator: str = 'gae'  # of advantages; the others have no critic, see rl/critic_free.py
  gae_level: str = 'token'  # segment: one action is a segment; border: λ decays between segments
  gamma: float = 1.0  # discount of advantages per action
  gae_lambda: float = 0.95  # weight of longer returns in GAE
  lambda_length_factor: float = 0.0  # α: the policy's λ is 1 - 1 / (α actions); 0: gae_lambda
  value_gae_lambda: float | None = None  # λ of what the critic learns; None: gae_lambda
  whiten: bool = True  # advantages to mean 0, variance 1 over the rollout
  clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps and 1 + clip_eps; 0: none
  clip_eps_high: float = 0.0  # upper side of the clip; 0: clip_eps
  dual_clip_ratio: float = 0.0  # above 1: bounds the loss of bad actions; 0: off
  importance_clip: float = 0.0  # bound of the weights π_old / π drawn from of tokens; 0: no weights
  value_clip_eps: float = 0.2  # 0: no clipping
  loss_aggregation: str = 'sequence'  # mean over each sequence, then over sequences; or token
  learn_on: str = 'all'  # tokens of the policy's loss, see rl/learned_tokens.py
  learn_share: float = 0.2  # of a rollout's tokens, for learn_on=high_ref_entropy
  entropy_coef: float = 0.0  # nats of entropy bonus in the loss
  data: StageData = StageData()
  policy_optimizer: Optimizer = Optimizer(learning_rate=5e-7)
  critic_optimizer: Optimizer = Optimizer(learning_rate=9e-6)

  @property
  def has_critic(self) -> bool:
    """Whether advantages come from the values of a critic."""
    return self.estimator == 'gae'


@dataclasses.dataclass(frozen=True)
class Compat:
  """Mistakes of the published code; `reference_exact` turns all of them on."""

  first_row_attention_mask: bool = False  # a micro-batch attends as far as its first row is long
  micro_batch_size: int = 4  # rows that are padded together there
  padded_length: bool = False  # length_threshold is compared after taking off the padded prompt
  bandit_skips_penalties: bool = False  # spread=bandit escapes the EOS and length penalties
  force_eos: bool = False  # an unfinished response's last token becomes the stop token
  keep_degenerate_pairs: bool = False  # truncated pairs end in the stop token; equal pairs stay
  strip_system_preamble: bool = False  # reward data lack the template's own system block
  keep_zero_bin: bool = False  # p below 0.0005 is fitted as ln 1e-10


def resolve_std_floor_ratio(shaping: RewardShaping) -> float | None:
  """Returns the floor of Std(p) as a fraction of b_std; None: no floor."""
  return shaping.std_floor_ratio or None
