"""Sections of the settings that shape training: models, segments, rewards, losses, optimizers.

`segjax.config.settings` puts them together with the sections of everything else.
"""

import dataclasses
import math

# Matrices of a layer that may have an adapter, by their names in HF checkpoints; and peft's name
# for all of them.
LORA_TARGETS = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')
# Matrices that are one in the checkpoints of family phi3, by its name there.
FUSED_TARGETS = {'qkv_proj': LORA_TARGETS[:3], 'gate_up_proj': LORA_TARGETS[4:6]}
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
  reads: str = 'auto'  # the policy's tokens, or text; auto: text if tokenizer or template differ
  head: str = 'auto'  # scalar, labels of a classifier, or tokens of a language model
  positive: str = ''  # label, or token, of a good step; the score is its logit less negative's
  negative: str = ''  # the other one; empty: the other of two labels
  step_tag: str = ''  # text after each segment in what it reads, where the score is; such as ' ки'
  step_delimiter: str | None = None  # between its steps, behind step_tag; None: as in the text


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
  train_head: bool = False  # a language model's head in full too, peft's modules_to_save

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
class LanguageLoraOverrides(LoraOverrides):
  """The same for a language model; a scalar head is always trained."""

  train_head: bool | None = None


@dataclasses.dataclass(frozen=True)
class LoraSettings(Lora):
  """Adapters instead of full training, of all trained networks or of each."""

  learning_rate_factor: float = 10.0  # of the optimizers of networks that have adapters
  sft: LanguageLoraOverrides = LanguageLoraOverrides()
  reward: LoraOverrides = LoraOverrides()
  dpo: LanguageLoraOverrides = LanguageLoraOverrides()
  policy: LanguageLoraOverrides = LanguageLoraOverrides()
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
class PairTraining:
  """Training on preference pairs."""

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
  label_smoothing: float = 0.0  # share of the pairs taken to be labelled the wrong way round
  data: StageData = StageData()
  optimizer: Optimizer = Optimizer(learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class RewardTraining(PairTraining):
  """Training of the segment reward model on pairs, on labels of steps, or on both."""

  segmentation: Segmentation = Segmentation()
  threshold_search: ThresholdSearch = ThresholdSearch()
  entropy_cache_dir: str = ''  # 'run' is the run's; the reference runs once, then is freed
  steps_weight: float = 1.0  # of the loss of labelled steps beside that of pairs; 0: measured only


@dataclasses.dataclass(frozen=True)
class DPO(PairTraining):
  """Direct Preference Optimization of the policy on pairs (https://arxiv.org/abs/2305.18290)."""

  beta: float = 0.1  # reward of a response per nat of log π - log π_ref
  optimizer: Optimizer = Optimizer(learning_rate=5e-7)


@dataclasses.dataclass(frozen=True)
class NormalizerFit:
  """Fit of the segment scores' mean and standard deviation by relative position."""

  kind: str = 'auto'  # auto: regression for segment and token, scalar for bandit
  weighting: str = 'uniform'  # of the bins of p in the regression; count: by their number of scores
  min_bin_count: int = 1  # scores that a bin must have
  max_pairs: int = 60_000  # pairs to score, both responses of each
  batch_size: int = 64  # pairs
  data: StageData = StageData()
