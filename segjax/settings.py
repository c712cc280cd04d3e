"""Typed, frozen settings of a run; their defaults live here and nowhere else.

A config file starts from `default_config()`, assigns what its preset changes, and the command line
assigns the rest. `segjax.checks` turns the result into `Settings`.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from segjax.rl.segmentation import GRANULARITIES

JOBS = ('demo', 'sft', 'reward', 'normalizer', 'ppo', 'evaluate')


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices per axis; one may be -1 and takes what the others leave."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How every network is run; the weights being trained are float32 whatever the dtype."""

  dtype: str = 'float32'  # of activations and of frozen weights: float32 or bfloat16
  remat: bool = True  # recompute each layer in the backward pass
  unroll: int = 1  # layers per iteration of the scan; all of them is faster for a tiny net on CPU
  attention: str = 'xla'  # or cudnn: flash attention on CUDA, bfloat16 only
  logprob_chunk: int = 256  # positions whose logits exist at once, per row


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
class RewardModel:
  """The reward model that PPO reads; empty fields are as segment_reward.json beside it says."""

  path: str = ''
  granularity: str = ''  # segment, token or bandit
  entropy_threshold: float = -1.0  # nats; negative: as stored
  normalizer: str = ''  # 'none', or 'published:NAME', say published:llama3_8b_sft/segment


@dataclasses.dataclass(frozen=True)
class Critic:
  """Where the critic comes from: 'policy' or 'reward_model', or a path of its own."""

  init: str = 'policy'


@dataclasses.dataclass(frozen=True)
class Data:
  """Rows: a local file or directory, or a hub id, and how they are cut to length (tokens)."""

  path: str = ''
  split: str = 'train'
  limit: int = 0  # rows to read; 0: all
  max_length: int = 2048  # of prompt and response; never more than the model's positions
  max_prompt_length: int = 1728  # what an overlong prompt keeps
  overlong: str = 'truncate_left'  # or drop, or error
  chat_template: str = ''  # jinja text or a file; empty: the tokenizer's own


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with linear warm-up and a cosine to min_ratio of the peak."""

  learning_rate: float = 1e-6
  warmup_ratio: float = 0.03
  min_ratio: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class SFT:
  """Supervised fine-tuning on the assistant's turns."""

  batch: int = 64  # rows per step
  epochs: int = 1
  steps: int = 0  # if positive, instead of epochs
  optimizer: Optimizer = Optimizer(learning_rate=2e-5)


@dataclasses.dataclass(frozen=True)
class Reward:
  """Training of the segment reward model on pairs."""

  granularity: str = 'segment'
  entropy_threshold: float = 2.0  # nats, of the reference's next-token distribution
  batch: int = 128  # pairs per step
  epochs: int = 1
  steps: int = 0
  holdout: float = 0.03  # share of the prompts never trained on
  margin: float = 0.0  # in the Bradley-Terry loss
  optimizer: Optimizer = Optimizer(learning_rate=1e-6)


@dataclasses.dataclass(frozen=True)
class NormalizerFit:
  """Statistics of segment scores by relative position."""

  kind: str = 'auto'  # regression for segment and token, scalar for bandit; or named
  pairs: int = 60_000  # at most; both sides are scored
  batch: int = 64  # pairs


@dataclasses.dataclass(frozen=True)
class Rollout:
  """How responses are sampled."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 1
  max_new_tokens: int = 1024
  batch: int = 0  # sequences generated at once; 0: the whole rollout
  recompute_logprob: bool = False  # old log-probs by a full forward instead of the decode loop


@dataclasses.dataclass(frozen=True)
class PPO:
  """Rollouts, dense rewards and updates; sizes are counted in sequences."""

  steps: int = 59  # rollouts
  rollout_batch: int = 1024
  minibatch: int = 128
  epochs: int = 1  # passes over each rollout
  score_batch: int = 0  # sequences scored at once; 0: the whole rollout
  spread: str = 'auto'  # even_split for segment and token, bandit for bandit; or repeat, end_only
  length_norm: bool = False  # divide the dense rewards by the response's length
  std_floor_ratio: float = 0.01  # Std(p) is at least this times b_std; negative: no floor
  reward_clip: float = 10.0
  kl_coef: float = 0.01
  kl_estimator: str = 'k1'
  gamma: float = 1.0
  gae_lambda: float = 0.95
  clip_eps: float = 0.2
  value_clip_eps: float = 0.2
  policy_optimizer: Optimizer = Optimizer(learning_rate=5e-7)
  critic_optimizer: Optimizer = Optimizer(learning_rate=9e-6)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Sampling on held-out prompts, before and after."""

  samples: int = 1  # responses per prompt
  batch: int = 64  # sequences at once
  gold: str = ''  # 'module:function' of (prompt, response) -> float, if the truth is known
  boundary: str = ''  # 'module:function' of a token's text -> whether a true segment ends there
  show: int = 3  # responses printed with their segments


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Training state saved during a stage."""

  every: int = 0  # steps; 0: only the finished model
  keep: int = 2


@dataclasses.dataclass(frozen=True)
class Demo:
  """The built-in language (segjax/data/demo.py) that the demo is about."""

  min_clauses: int = 2
  max_clauses: int = 5
  sft_rows: int = 4096
  pairs: int = 8192


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run; each job reads the sections it needs."""

  seed: int = 0
  stages: tuple[str, ...] = ()
  max_bad_steps: int = 1  # stop after so many steps in a row with a loss or gradient not finite
  wandb_project: str = ''  # also send metrics there; needs `pip install segjax[wandb]`
  mesh: Mesh = Mesh()
  runtime: Runtime = Runtime()
  network: Network = Network()
  policy: Model = Model()
  reference: Model = Model()
  reward_model: RewardModel = RewardModel()
  critic: Critic = Critic()
  data: Data = Data()
  sft: SFT = SFT()
  reward: Reward = Reward()
  normalizer: NormalizerFit = NormalizerFit()
  rollout: Rollout = Rollout()
  ppo: PPO = PPO()
  evaluate: Evaluate = Evaluate()
  checkpoint: Checkpoint = Checkpoint()
  demo: Demo = Demo()


def default_config() -> ConfigDict:
  """Every setting with its default, for a config file to change."""
  return ConfigDict(dataclasses.asdict(Settings()))


def parse_preset(preset: str, names: tuple[str, ...]) -> tuple[str, str]:
  """'NAME[,segment|token|bandit]' as (name, granularity), the granularity '' if not named."""
  name, _, granularity = preset.partition(',')
  _one_of_presets(name, names, preset)
  if granularity:
    _one_of_presets(granularity, GRANULARITIES, preset)
  return name, granularity


def _one_of_presets(value: str, names: tuple[str, ...], preset: str) -> None:
  if value not in names:
    raise ValueError(
      f'preset {preset!r}: {value!r} is not one of {", ".join(names)}; presets are written '
      'NAME[,segment|token|bandit].'
    )


def replace(settings: Settings, **values: Any) -> Settings:
  """Settings with dotted keys replaced: replace(s, **{'data.path': 'x'})."""
  for key, value in values.items():
    section, _, name = key.rpartition('.')
    if section:
      value = dataclasses.replace(getattr(settings, section), **{name: value})
    settings = dataclasses.replace(settings, **{section or name: value})
  return settings
