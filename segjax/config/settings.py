"""Typed, frozen settings of a run; their defaults live here and nowhere else.

A config file starts from `presets.default_config()`, assigns what its preset changes, and the
command line assigns the rest. `checks` turns the result into `Settings`.
"""

import dataclasses
from typing import Any

JOBS = (
  'demo',
  'sft',
  'reward',
  'normalizer',
  'ppo',
  'evaluate',
  'evaluate_reward',
  'answers',
  'selfcheck',
  'chat',
)

# What a layer computes, in this order, and can be kept for the backward pass: its input, the
# projections with rotary positions, what attention found, the sum with the input, the MLP's halves.
ACTIVATIONS = ('hidden', 'query', 'key', 'value', 'attention', 'residual', 'gate', 'up')


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Devices per axis; one may be -1 and takes what the others leave."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How every network is run."""

  compute_dtype: str = 'float32'  # of activations and of frozen weights: float32 or bfloat16
  param_dtype: str = 'float32'  # of weights being trained; bfloat16 is rounded at random
  frozen_params_memory: str = (
    'device'  # or host: where reference and reward model wait between uses
  )
  remat: str = 'full'  # recompute layers in the backward pass; none, or names of what to keep
  offload_activations: str = ''  # names of what is kept in host memory instead
  scan_unroll: int = (
    1  # layers per iteration of the scan; all of them is faster for a tiny net on CPU
  )
  attention: str = 'auto'  # splash on TPU, cudnn on CUDA in bfloat16, else xla; or one of these
  logprob_chunk_size: int = 256  # positions whose logits exist at once, per row


@dataclasses.dataclass(frozen=True)
class Model:
  """A checkpoint: an HF directory or a hub id."""

  path: str = ''


@dataclasses.dataclass(frozen=True)
class Network:
  """Sizes of the network that the demo builds; elsewhere checkpoints say, and this only counts."""

  vocab_size: int = 0  # 0: the tokenizer's
  hidden_size: int = 64
  intermediate_size: int = 192
  num_hidden_layers: int = 2
  num_attention_heads: int = 4
  num_key_value_heads: int = 2
  max_position_embeddings: int = 256
  rope_theta: float = 500_000.0
  tie_word_embeddings: bool = False
  initializer_range: float = 0.02


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """How a response is cut into segments, and how their scores make up its own."""

  granularity: str = 'segment'  # or token: each its own segment; or bandit: the response is one
  boundary: str = 'entropy'  # where segments begin: entropy, fixed_length or delimiter
  entropy_threshold: float = 2.0  # nats, of the reference's next-token distribution
  segment_length: int = 16  # tokens, for boundary=fixed_length
  delimiters: str = '.!?\n'  # characters that end a segment, for boundary=delimiter
  min_segment_length: int = 1  # tokens; a cut that would close a shorter segment is ignored
  stop_token: str = 'outside'  # of all segments, or inside the last one
  aggregation: str = 'mean'  # of segment scores: mean, sum, min, max, last, softmax
  softmax_temperature: float = 1.0  # of aggregation=softmax


AS_STORED = Segmentation('', '', -1.0, 0, '', 0, '', '', 0.0)  # an empty field overrules nothing


@dataclasses.dataclass(frozen=True)
class RewardModelSettings:
  """The reward model that PPO reads; empty fields are as segment_reward.json beside it says."""

  path: str = ''
  segmentation: Segmentation = AS_STORED
  normalizer: str = ''  # 'none', or 'published:NAME', say published:llama3_8b_sft/segment


@dataclasses.dataclass(frozen=True)
class Critic:
  """Where the critic comes from, and how long it learns alone."""

  init: str = 'policy'  # or reward_model, or a path of its own
  warmup_rollouts: int = 0  # rollouts before the policy is trained too


@dataclasses.dataclass(frozen=True)
class Data:
  """Rows: a local file or directory, or a hub id, and how they are cut to length (tokens)."""

  path: str = ''
  split: str = 'train'
  max_rows: int = 0  # rows to read; 0: all
  max_length: int = 2048  # of prompt and response; never more than the model's positions
  max_prompt_length: int = 1728  # what an overlong prompt keeps
  overlong_policy: str = 'truncate_left'  # or drop, or error
  chat_template: str = ''  # jinja text or a file; empty: the tokenizer's own


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with linear warm-up and a cosine to min_ratio of the peak."""

  learning_rate: float = 1e-6
  warmup_ratio: float = 0.03
  min_lr_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0
  moments_dtype: str = 'float32'  # in which both moments are stored: float32 or bfloat16


@dataclasses.dataclass(frozen=True)
class SFT:
  """Supervised fine-tuning on the assistant's turns."""

  batch_size: int = 64  # rows per step
  micro_batch_size: int = 0  # rows at once, gradients added up; 0: the whole batch
  packing_length: int = 0  # tokens of a row that several conversations share; 0: a row for each
  num_epochs: int = 1
  max_steps: int = 0  # if positive, instead of epochs
  optimizer: Optimizer = Optimizer(learning_rate=2e-5)


@dataclasses.dataclass(frozen=True)
class ThresholdSearch:
  """Finds the entropy threshold on responses of the SFT model, before reward training.

  At most one of the two targets is set; with neither, segmentation.entropy_threshold stands.
  """

  target_segment_length: float = 0.0  # tokens, mean over the samples
  entropy_quantile: float = 0.0  # share of the tokens whose entropy is at most the threshold
  num_samples: int = 512
  max_new_tokens: int = 1024
  batch_size: int = 64  # sequences at once


@dataclasses.dataclass(frozen=True)
class RewardTraining:
  """Training of the segment reward model on pairs."""

  segmentation: Segmentation = Segmentation()
  threshold_search: ThresholdSearch = ThresholdSearch()
  entropy_cache_dir: str = (
    ''  # a directory: the reference runs once over the data, and is then let go
  )
  batch_size: int = 128  # pairs per step
  micro_batch_size: int = (
    0  # pairs, or packed rows, at once, gradients added up; 0: the whole batch
  )
  packing_length: int = 0  # tokens of a row that several responses share; 0: a row for each
  num_epochs: int = 1
  max_steps: int = 0
  holdout_fraction: float = 0.03  # share of the prompts never trained on
  eval_every: int = 0  # steps between two looks at (at most 512 of) the held-out pairs; 0: none
  margin: float = 0.0  # in the Bradley-Terry loss
  rating_margin_coef: float = 0.0  # times the difference of the pair's ratings, added to the margin
  optimizer: Optimizer = Optimizer(learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class NormalizerFit:
  """Statistics of segment scores by relative position."""

  kind: str = 'auto'  # regression for segment and token, scalar for bandit; or none, global, last
  weighting: str = 'bin'  # in the regression: every bin of p alike; or by count
  min_bin_count: int = 1  # scores that a bin must have
  max_pairs: int = 60_000  # at most; both sides are scored
  batch_size: int = 64  # pairs


@dataclasses.dataclass(frozen=True)
class RolloutSettings:
  """How responses are sampled."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 1
  max_new_tokens: int = 1024
  samples_per_prompt: int = 1  # responses per prompt
  max_concurrent: int = 0  # responses under way at once; 0: the whole rollout
  recompute_logprob: bool = False  # old log-probs by a full forward instead of the decode loop


@dataclasses.dataclass(frozen=True)
class RewardShaping:
  """From scores to one reward per token: normalise, spread, mix, penalise, clamp."""

  spread: str = 'auto'  # even_split for segment and token, bandit for bandit; or repeat, end_only
  length_norm: bool = False  # divide the dense rewards by the response's length
  std_floor_ratio: float = 0.01  # Std(p) is at least this times b_std; negative: no floor
  redistribute: str = 'none'  # or red: a segment earns the change of the score from end to end
  red_baseline: str = 'prompt'  # the score before the first segment: that of the prompt, or zero
  reward_model_weight: float = 1.0
  reward_fn: str = ''  # 'module:function' of (prompt, response); see train/custom_reward.py
  reward_fn_weight: float = 1.0
  missing_eos_penalty: str = (
    'off'  # of unfinished responses: per_token (instead of rewards) or at_eos
  )
  missing_eos_penalty_value: float = -0.05
  length_penalty: str = 'off'  # past length_threshold: threshold (instead of rewards) or linear
  length_penalty_value: float = -0.05
  length_threshold: int = 800  # tokens
  reward_clip: float = 10.0  # size of a token's reward before the KL penalty


@dataclasses.dataclass(frozen=True)
class PPO:
  """Rollouts, advantages and updates; sizes are counted in sequences."""

  max_steps: int = 59  # rollouts
  rollout_batch_size: int = 1024
  minibatch_size: int = 128
  micro_batch_size: int = 0  # rows at once, gradients added up; 0: the whole minibatch
  packing_length: int = 0  # tokens of a row that several sequences share; 0: a row for each
  num_ppo_epochs: int = 1  # passes over each rollout
  eval_every: int = 0  # steps between two samplings of held-out prompts; 0: none
  holdout_fraction: float = 0.0  # share of the prompts never trained on, for eval_every
  scoring_batch_size: int = 0  # sequences scored at once; 0: the whole rollout
  kl_coef: float = 0.01
  kl_estimator: str = 'k1'  # or k2, k3
  kl_placement: str = 'reward'  # or loss
  kl_target: float = 0.0  # nats per response that kl_coef is adapted to hold; 0: kl_coef is fixed
  skip_if_kl_above: float = (
    0.0  # nats per response; a rollout beyond is not learned from; 0: any is
  )
  skip_if_reward_above: float = 0.0  # the same for the largest reward of a token, before clipping
  kl_horizon: int = 10_000  # sequences; how slowly it adapts
  gae_level: str = 'token'  # or segment: macro actions
  gamma: float = 1.0
  gae_lambda: float = 0.95
  whiten: bool = True  # advantages to mean 0, variance 1 over the rollout
  clip_eps: float = 0.2
  clip_eps_high: float = 0.0  # upper side of the clip; 0: clip_eps
  dual_clip_ratio: float = 0.0  # above 1: bounds the loss of bad actions; 0: off
  value_clip_eps: float = 0.2  # 0: no clipping
  loss_aggregation: str = 'sequence'  # over each sequence's tokens, then over sequences; or token
  entropy_coef: float = 0.0  # nats of entropy bonus in the loss
  policy_optimizer: Optimizer = Optimizer(learning_rate=5e-7)
  critic_optimizer: Optimizer = Optimizer(learning_rate=9e-6)


@dataclasses.dataclass(frozen=True)
class Compat:
  """What the published code does by mistake; `reference_exact` turns all of it on."""

  first_row_attention_mask: bool = (
    False  # attention reaches as far as the first row of a micro-batch is long
  )
  micro_batch_size: int = 4  # rows that are padded together there
  padded_length: bool = False  # length_threshold is compared after taking off the padded prompt
  bandit_skips_penalties: bool = False  # spread=bandit escapes the end and length penalties
  force_eos: bool = False  # an unfinished response's last token is overwritten by the stop token
  keep_degenerate_pairs: bool = (
    False  # so is a cut pair's, and pairs that cutting made equal are kept
  )
  strip_system_preamble: bool = False  # reward data lack the system block that the template writes
  keep_zero_bin: bool = False  # p below 0.0005 is fitted as ln 1e-10


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Sampling on held-out prompts, before and after."""

  samples_per_prompt: int = 1  # responses per prompt
  batch_size: int = 64  # sequences at once
  gold_reward_fn: str = (
    ''  # 'module:function' of (prompt, response) -> float, if the truth is known
  )
  boundary_fn: str = ''  # 'module:function' of a token's text -> whether a true segment ends there
  num_printed: int = 3  # responses printed with their segments


@dataclasses.dataclass(frozen=True)
class EvaluateReward:
  """A reward model against human judgements: of pairs, and of spans of a response."""

  pairs: str = ''  # files or hub ids of pairs, joined by commas; empty: config.data.path alone
  spans: str = ''  # a file or hub id of responses with marked errors
  batch_size: int = 64  # pairs, or marked responses, at once


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to the questions of public judges."""

  model_name: str = ''  # of the model in the judge's files; empty: from policy.path
  category_temperatures: bool = False  # as FastChat's by MT-Bench's categories, not rollout's
  batch_size: int = 64  # questions at once


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """Training state saved during a stage."""

  every_minutes: float = 10.0  # saved when so many have gone by since the last time; 0: never
  every_steps: int = 0  # saved after so many steps; 0: by `minutes` alone
  max_to_keep: int = 2  # the newest ones that stay
  best_metric: str = ''  # a metric, say eval/reward: the step at which it was largest stays too
  max_failures: int = 3  # saves in a row that may fail, as on a full disk
  directory: str = ''  # a directory or bucket (gs://...) in place of the stage's own


@dataclasses.dataclass(frozen=True)
class Report:
  """Responses kept for report.html; they change nothing in what a run computes."""

  every_steps: int = 5  # steps of PPO between two times; the last step too; 0: none
  responses_per_rollout: int = 8  # of a rollout, each time
  eval_responses: int = 64  # held-out responses kept of each model


@dataclasses.dataclass(frozen=True)
class Demo:
  """The built-in language (segjax/data/demo_language.py) that the demo is about."""

  min_clauses: int = 2
  max_clauses: int = 5
  sft_rows: int = 4096
  pairs: int = 8192


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run; each job reads the sections it needs."""

  seed: int = 0
  stages: tuple[str, ...] = ()
  log_every: int = 50  # steps between two lines of metrics on the console; 0: none
  profile_steps: str = ''  # first:last, steps from 1 on, traced into <stage>/profile
  max_skipped_steps: int = 1  # stop after so many steps in a row with a loss or gradient not finite
  reference_exact: bool = False  # as the published code computes, mistakes included
  wandb_project: str = ''  # also send metrics there; needs `pip install segjax[wandb]`
  mesh: MeshSettings = MeshSettings()
  runtime: Runtime = Runtime()
  network: Network = Network()
  policy: Model = Model()
  reference: Model = Model()
  reward_model: RewardModelSettings = RewardModelSettings()
  critic: Critic = Critic()
  data: Data = Data()
  sft: SFT = SFT()
  reward: RewardTraining = RewardTraining()
  normalizer: NormalizerFit = NormalizerFit()
  rollout: RolloutSettings = RolloutSettings()
  reward_shaping: RewardShaping = RewardShaping()
  ppo: PPO = PPO()
  compat: Compat = Compat()
  evaluate: Evaluate = Evaluate()
  evaluate_reward: EvaluateReward = EvaluateReward()
  answers: Answers = Answers()
  checkpoint: CheckpointSettings = CheckpointSettings()
  report: Report = Report()
  demo: Demo = Demo()


def replace(settings: Any, **values: Any) -> Any:
  """Settings with dotted keys replaced: replace(s, **{'data.path': 'x'})."""
  for key, value in values.items():
    section, _, name = key.partition('.')
    if name:
      value = replace(getattr(settings, section), **{name: value})
    settings = dataclasses.replace(settings, **{section: value})
  return settings
