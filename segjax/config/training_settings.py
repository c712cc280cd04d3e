"""Sections of the settings that shape training: models, segments, rewards, losses, optimizers.

`segjax.config.settings` puts them together with the sections of everything else.
"""

import dataclasses
import math

# Matrices of a layer that may have an adapter, by their names in HF checkpoints; and peft's name
# for all of them.
LORA_TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
ALL_LINEAR = 'all-linear'


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """Boundaries of segments in a response, and the aggregation of their scores."""

  granularity: str = 'segment'  # token: each token is a segment; bandit: the response is one
  boundary: str = 'entropy'  # where segments begin, with granularity=segment; see rl/cuts.py
  entropy_threshold: float = 2.0  # nats, of the reference's next-token distribution
  segment_length: int = 16  # tokens, for boundary=fixed_length
  delimiters: str = '.!?\n'  # characters that end a segment, for boundary=delimiter
  min_segment_length: int = 1  # tokens; a boundary that would close a shorter segment is ignored
  include_eos: bool = False  # whether the stop token belongs to the last segment, or to none
  aggregation: str = 'mean'  # of segment scores to the response's score
  softmax_temperature: float = 1.0  # of aggregation=softmax
  boundary_fn: str = ''  # 'module:function' of a token's text, for boundary=function
  probability_threshold: float = 0.9  # of a token under the reference, for boundary=low_probability
  jump_threshold: float = 1.0  # of the raw score, token to token, for boundary=score_jump
  shuffle_seed: int = 0  # other cuts for every text, for boundary=shuffled_entropy and random


@dataclasses.dataclass(frozen=True)
class SegmentationOverrides:
  """Fields of `Segmentation` that replace those stored with a reward model; None keeps them."""

  granularity: str | None = None
  boundary: str | None = None
  entropy_threshold: float | None = None
  segment_length: int | None = None
  delimiters: str | None = None
  min_segment_length: int | None = None
  include_eos: bool | None = None
  aggregation: str | None = None
  softmax_temperature: float | None = None
  boundary_fn: str | None = None
  probability_threshold: float | None = None
  jump_threshold: float | None = None
  shuffle_seed: int | None = None


@dataclasses.dataclass(frozen=True)
class RewardModelSettings:
  """The reward model that PPO reads; its segment_reward.json holds what is not set here."""

  path: str = ''  # HF directory or hub id
  segmentation: SegmentationOverrides = SegmentationOverrides()
  normalizer: str = ''  # 'none', or 'published:NAME' such as published:llama3_8b_sft/segment


@dataclasses.dataclass(frozen=True)
class Critic:
  """Initial weights of the critic, and its warm-up."""

  init: str = 'policy'  # or reward_model, or a path of its own
  warmup_rollouts: int = 0  # rollouts before the policy is trained too


@dataclasses.dataclass(frozen=True)
class Lora:
  """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of a frozen network."""

  rank: int = 0  # columns of A and rows of B; 0: all weights are trained
  alpha: float = 32.0  # the product of A and B is multiplied by alpha / rank
  targets: tuple[str, ...] = (ALL_LINEAR,)  # or names: q_proj,k_proj,v_proj,o_proj,gate_proj, ...
  rs: bool = False  # alpha / sqrt(rank) instead, as in rank-stabilised LoRA (arXiv 2312.03732)

  @property
  def scale(self) -> float:
    """Factor of x A B."""
    return self.alpha / (math.sqrt(self.rank) if self.rs else self.rank)


@dataclasses.dataclass(frozen=True)
class LoraOverrides:
  """The same for one network alone; None keeps the value of all."""

  rank: int | None = None
  alpha: float | None = None
  targets: tuple[str, ...] | None = None
  rs: bool | None = None
  learning_rate_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class LoraSettings(Lora):
  """Adapters instead of full training, of all trained networks or of each."""

  learning_rate_factor: float = 10.0  # of the optimizers of networks that have adapters
  sft: LoraOverrides = LoraOverrides()
  reward: LoraOverrides = LoraOverrides()
  policy: LoraOverrides = LoraOverrides()
  critic: LoraOverrides = LoraOverrides()


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with linear warm-up and a cosine to min_lr_ratio of the peak."""

  learning_rate: float = 1e-6  # peak
  warmup_ratio: float = 0.03  # share of all steps in which the rate rises from 0
  min_lr_ratio: float = 0.1  # last learning rate, as a share of the peak
  beta1: float = 0.9  # decay of the first moment
  beta2: float = 0.95  # decay of the second moment
  epsilon: float = 1e-8  # added to the root of the second moment
  weight_decay: float = 0.0  # decoupled from the gradient
  decayed_weights: str = 'kernels'  # matrices: embeddings too; all: norms and biases too
  max_grad_norm: float = 1.0  # larger gradients are scaled to this norm; 0: none
  moments_dtype: str = 'float32'  # in which both moments are stored


@dataclasses.dataclass(frozen=True)
class StageData:
  """Rows of this stage alone; what is empty is that of config.data."""

  path: str = ''  # sources as in data.path
  split: str = ''  # of these sources


@dataclasses.dataclass(frozen=True)
class SFT:
  """Supervised fine-tuning on the assistant's turns."""

  batch_size: int = 64  # rows per step
  micro_batch_size: int = 0  # rows at once, gradients accumulated; 0: the whole batch
  micro_batch_tokens: int = 0  # the same in tokens of a device; 0: micro_batch_size
  packing_length: int = 0  # tokens of a row that several conversations share; 0: one per row
  num_epochs: int = 1  # passes over the rows
  max_steps: int = 0  # if positive, replaces num_epochs
  holdout_fraction: float = 0.0  # share of the conversations never trained on, for a held-out loss
  eval_every: int = 0  # steps between evaluations on at most 512 of them; 0: at the end alone
  data: StageData = StageData()
  optimizer: Optimizer = Optimizer(learning_rate=2e-5)


@dataclasses.dataclass(frozen=True)
class ThresholdSearch:
  """Search for the entropy threshold on responses of the SFT model, before reward training.

  At most one of the two targets is set; without either, segmentation.entropy_threshold is used.
  """

  target_segment_length: float = 0.0  # tokens, mean over the samples; 0: off
  entropy_quantile: float = 0.0  # share of the tokens at or below the threshold; 0: off
  num_samples: int = 512  # responses
  max_new_tokens: int = 1024  # of a response
  batch_size: int = 64  # sequences at once


@dataclasses.dataclass(frozen=True)
class RewardTraining:
  """Training of the segment reward model on pairs."""

  segmentation: Segmentation = Segmentation()
  threshold_search: ThresholdSearch = ThresholdSearch()
  entropy_cache_dir: str = ''  # 'run' is the run's; the reference runs once, then is freed
  batch_size: int = 128  # pairs per step
  micro_batch_size: int = 0  # pairs, or packed rows, at once; 0: the whole batch
  micro_batch_tokens: int = 0  # the same in tokens of a device; 0: micro_batch_size
  packing_length: int = 0  # tokens of a row that several responses share; 0: one per row
  num_epochs: int = 1  # passes over the pairs
  max_steps: int = 0  # if positive, replaces num_epochs
  holdout_fraction: float = 0.03  # share of the prompts never trained on
  eval_every: int = 0  # steps between evaluations on at most 512 held-out pairs; 0: none
  margin: float = 0.0  # in the Bradley-Terry loss
  rating_margin_coef: float = 0.0  # times the difference of the pair's ratings, added to margin
  data: StageData = StageData()
  optimizer: Optimizer = Optimizer(learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class NormalizerFit:
  """Fit of the segment scores' mean and standard deviation by relative position."""

  kind: str = 'auto'  # auto: regression for segment and token, scalar for bandit
  weighting: str = 'uniform'  # of the bins of p in the regression; count: by their number of scores
  min_bin_count: int = 1  # scores that a bin must have
  max_pairs: int = 60_000  # pairs to score, both responses of each
  batch_size: int = 64  # pairs
  data: StageData = StageData()


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
class RewardShaping:
  """From scores to one reward per token: normalise, spread, mix, penalise, clamp."""

  spread: str = 'auto'  # auto: even_split for segment and token, bandit for bandit
  length_norm: bool = False  # divide the dense rewards by the response's length
  credit: str = 'sum'  # min: the worse a segment of a response, the more of its reward counts
  credit_temperature: float = 0.1  # of credit=min, in the unit of z; small: the worst alone
  std_floor_ratio: float = 0.01  # Std(p) is at least this times b_std; 0: no floor
  redistribute: str = 'none'  # red: a segment earns the difference of the score over it
  red_baseline: str = 'prompt'  # the score before the first segment
  reward_model_weight: float = 1.0  # factor of the reward model in the sum with reward_fn
  reward_fn: str = ''  # 'module:function' of (prompt, response); see train/custom_reward.py
  reward_fn_weight: float = 1.0  # factor of reward_fn
  missing_eos_penalty: str = 'off'  # of unfinished responses; per_token replaces rewards
  missing_eos_penalty_value: float = -0.05  # reward of each token, or added at the end
  length_penalty: str = 'off'  # past length_threshold; threshold replaces rewards
  length_penalty_value: float = -0.05  # reward of each token, or added past the threshold
  length_threshold: int = 800  # tokens
  reward_clip: float = 10.0  # largest size of a token's reward before the KL penalty; 0: none


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
  scoring_batch_size: int = 0  # sequences scored at once; 0: the whole rollout
  kl_coef: float = 0.01  # factor of the KL penalty to the reference
  kl_estimator: str = 'k1'  # of KL from the log-probs of sampled tokens
  kl_placement: str = 'reward'  # a penalty in the reward, or a term of the loss
  kl_target: float = 0.0  # nats per response that kl_coef is adapted to; 0: kl_coef is fixed
  kl_horizon: int = 10_000  # sequences over which kl_coef is adapted
  skip_if_kl_above: float = 0.0  # nats per response; no update on such a rollout; 0: off
  skip_if_reward_above: float = 0.0  # the same for a token's largest reward before clipping
  gae_level: str = 'token'  # segment: one action is a segment
  gamma: float = 1.0  # discount of advantages per action
  gae_lambda: float = 0.95  # weight of longer returns in GAE
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
