"""Typed, frozen settings of a run; defaults live here, in `training_settings`, `ppo_settings`.

A config file starts from `presets.default_config()`, assigns what its preset changes, and the
command line assigns the rest. `parse` turns the result into `Settings`.
"""

import dataclasses
from typing import Any

from segjax.config.ppo_settings import PPO, Compat, LMReward, RewardShaping, RolloutSettings
from segjax.config.training_settings import (
  DPO,
  SFT,
  Critic,
  LanguageLoraOverrides,
  Lora,
  LoraOverrides,
  LoraSettings,
  NormalizerFit,
  Optimizer,
  PairTraining,
  RewardModelSettings,
  RewardTraining,
  Segmentation,
  SegmentationOverrides,
  StageData,
  ThresholdSearch,
)

__all__ = [
  'DPO',
  'PPO',
  'SFT',
  'Compat',
  'Critic',
  'LMReward',
  'LanguageLoraOverrides',
  'Lora',
  'LoraOverrides',
  'LoraSettings',
  'NormalizerFit',
  'Optimizer',
  'PairTraining',
  'RewardModelSettings',
  'RewardShaping',
  'RewardTraining',
  'RolloutSettings',
  'Segmentation',
  'SegmentationOverrides',
  'StageData',
  'ThresholdSearch',
]


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Devices per axis; one may be -1 and takes the remaining devices."""

  data: int = 1  # devices over which the batch alone is split
  fsdp: int = -1  # devices over which batch and weights are split
  tensor: int = 1  # devices over which heads and hidden units are split


@dataclasses.dataclass(frozen=True)
class Runtime:
  """Precision, memory and implementation of every network."""

  compute_dtype: str = 'float32'  # of activations and of frozen weights
  param_dtype: str = 'float32'  # of trained weights but norms and heads; bfloat16: see help memory
  frozen_params_memory: str = 'device'  # of reference and reward model between uses
  remat: str = 'full'  # recompute all in the backward pass; none; or names of activations to keep
  offload_activations: str = ''  # names of activations kept in host memory
  scan_unroll: int = 1  # layers per iteration of the scan; all is faster for a tiny network on CPU
  attention: str = 'auto'  # auto: splash on TPU, cudnn and flash on CUDA in bfloat16, else xla
  vocab_chunk_size: int = 8192  # entries of the vocabulary whose logits exist at once
  round_logits: bool = False  # to compute_dtype before the softmax, as in transformers


@dataclasses.dataclass(frozen=True)
class Model:
  """A checkpoint: an HF directory or a hub id."""

  path: str = ''  # HF directory or hub id


@dataclasses.dataclass(frozen=True)
class Network:
  """Sizes of the demo's network; for other runs, sizes that --dry_run and plan assume."""

  vocab_size: int = 0  # 0: the tokenizer's
  hidden_size: int = 64  # width of the residual stream
  intermediate_size: int = 192  # width of the MLP
  num_hidden_layers: int = 2  # layers
  num_attention_heads: int = 4  # query heads
  num_key_value_heads: int = 2  # key and value heads
  max_position_embeddings: int = 256  # positions
  rope_theta: float = 500_000.0  # base of the rotary frequencies
  tie_word_embeddings: bool = False  # input and output embeddings share weights
  initializer_range: float = 0.02  # standard deviation of random weights
  head_dim: int = 0  # width of a head; 0: hidden_size / num_attention_heads
  family: str = 'llama'  # of the checkpoint that it becomes


@dataclasses.dataclass(frozen=True)
class Columns:
  """Names that the data have for our columns; empty: our own and those of well-known forms."""

  messages: str = ''  # a conversation: a list of {role, content}
  prompt: str = ''  # a question, or a list of {role, content}
  response: str = ''  # the answer to the prompt, for sft
  chosen: str = ''  # the preferred answer
  rejected: str = ''  # the other answer
  chosen_rating: str = ''  # a number
  rejected_rating: str = ''  # a number
  system: str = ''  # the system message
  text: str = ''  # plain text, for sft
  steps: str = ''  # ends and labels of steps, for reward: [[end, label], ...]
  completions: str = ''  # the texts of the steps, where `labels` has a label of each
  labels: str = ''  # of `completions`


@dataclasses.dataclass(frozen=True)
class Data:
  """Rows of files, directories or hub ids, and their lengths in tokens."""

  path: str = ''  # file, directory or hub id; several: 'a.jsonl*2,shards/*.jsonl' with weights
  split: str = 'train'  # of each source; with slices: train[:90%], train[100:200]
  max_rows: int = 0  # rows to read from the front of each source; 0: all
  bad_rows: str = 'error'  # rows that cannot be read; drop leaves them out and counts them
  max_length: int = 2048  # of prompt and response, at most the model's positions
  max_prompt_length: int = 1728  # of an overlong prompt after truncation
  overlong_policy: str = 'truncate_left'  # of rows longer than the limits
  chat_template: str = ''  # llama3, chatml, Jinja text or a file; empty: the tokenizer's own
  template_date: str = ''  # ISO date that the template reads; empty: of the run's first start
  columns: Columns = Columns()


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Sampling of policy and reference on held-out prompts."""

  samples_per_prompt: int = 1  # responses per prompt
  batch_size: int = 64  # sequences at once
  gold_reward_fn: str = ''  # 'module:function' of (prompt, response) -> gold reward; as reward_fn
  boundary_fn: str = ''  # 'module:function' of a token's text -> whether a segment ends there
  credit_fn: str = ''  # 'module:function' of (prompt, response) -> true credit of each of these
  continuations: int = 0  # of a clause's start and end, whose gold is the true credit; 0: credit_fn
  num_printed: int = 3  # responses printed with their segments
  data: StageData = StageData()


@dataclasses.dataclass(frozen=True)
class EvaluateReward:
  """Agreement of a reward model with human judgements of pairs and of spans of responses."""

  pairs: str = ''  # files or hub ids of pairs, joined by commas; empty: config.data.path alone
  spans: str = ''  # a file or hub id of responses with marked errors
  batch_size: int = 64  # pairs, or marked responses, at once


@dataclasses.dataclass(frozen=True)
class Sample:
  """Several responses to each prompt, of which the best are rows for sft."""

  samples_per_prompt: int = 8  # responses to each prompt
  keep: int = 1  # of them, the best that end by themselves
  rank_by: str = 'score'  # of the reward model; or reward: the sum of the dense rewards of PPO
  batch_size: int = 64  # responses at once, those to a prompt together
  data: StageData = StageData()
  search: str = 'response'  # best of samples_per_prompt whole responses; segment: of each segment
  segment_tokens: int = 64  # of the continuations in which search=segment finds the next segment


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to the questions of public judges."""

  model_name: str = ''  # in the judge's files; empty: from policy.path
  category_temperatures: bool = False  # FastChat's temperatures for MT-Bench
  batch_size: int = 64  # questions at once
  data: StageData = StageData()


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """Training state saved during a stage."""

  every_minutes: float = 10.0  # minutes between two saves; 0: by every_steps alone
  every_steps: int = 0  # steps between two saves; 0: by every_minutes alone
  max_to_keep: int = 2  # newest checkpoints that are kept
  best_metric: str = ''  # metric, such as eval/reward, whose best step is kept too
  max_failures: int = 3  # failed saves in a row before the run stops
  directory: str = ''  # directory or bucket (gs://...); empty: the stage's own


@dataclasses.dataclass(frozen=True)
class Report:
  """Responses logged for report.html; results do not depend on them."""

  every_steps: int = 5  # PPO steps between two logged rollouts; the last is logged; 0: none
  responses_per_rollout: int = 8  # of a rollout
  eval_responses: int = 64  # held-out responses of each model


@dataclasses.dataclass(frozen=True)
class Demo:
  """The built-in language (segjax/data/languages.py) of the demo."""

  language: str = 'describe'  # whose gold reward is a mean over clauses; others are for studies
  min_clauses: int = 2  # of a response of the language describe
  max_clauses: int = 5  # the same
  sft_rows: int = 4096  # conversations for SFT
  pairs: int = 8192  # preference pairs


@dataclasses.dataclass(frozen=True)
class Study:
  """A comparison of arms over seeds and languages; each cell is a run in its own directory."""

  arms: tuple[str, ...] = ()  # 'NAME KEY=VALUE KEY=VALUE ...': the settings that an arm changes
  only: tuple[str, ...] = ()  # names of the arms to run; empty: all of them
  baseline: str = ''  # the arm that all others are compared with; empty: the first
  seeds: tuple[str, ...] = ('0:9',)  # below 100; first:last, or one by one: 0,1,5
  languages: tuple[str, ...] = ('requests',)  # built-in ones, see demo.language
  kl_levels: tuple[str, ...] = ('4', '8', '12')  # nats per response at which gold is compared
  main_level: str = '8'  # the one of them that verdicts are about
  grid: tuple[str, ...] = ()  # 'KEY=VALUE|VALUE|...': constants that are tuned for each arm
  trials: int = 0  # points of the grid that each arm tries; 0: the constants of the config
  tuning_seeds: tuple[str, ...] = ('100:101',)  # from 100 on
  tuning_file: str = ''  # tuning.json of an earlier study, in place of trials
  runs: str = ''  # directory of the runs, which several studies may share; empty: WORKDIR/runs
  jobs: int = 1  # runs at once; results do not depend on it


@dataclasses.dataclass(frozen=True)
class Settings:
  """All settings of a run; each job reads the sections it needs."""

  seed: int = 0  # of all random numbers
  stages: tuple[str, ...] = ()  # jobs to run, in order
  log_every: float = 5.0  # seconds between two lines of metrics, up to 60 in a long stage; 0: none
  profile_steps: str = ''  # first:last, steps from 1, traced into <stage>/profile
  max_skipped_steps: int = 1  # stop after this many non-finite steps in a row
  reference_exact: bool = False  # computes as the published code does, mistakes included
  wandb_project: str = ''  # sends metrics there too; needs `pip install -e '.[wandb]'`
  mesh: MeshSettings = MeshSettings()
  runtime: Runtime = Runtime()
  network: Network = Network()
  policy: Model = Model()
  reference: Model = Model()
  reward_model: RewardModelSettings = RewardModelSettings()
  critic: Critic = Critic()
  lora: LoraSettings = LoraSettings()
  data: Data = Data()
  sft: SFT = SFT()
  reward: RewardTraining = RewardTraining()
  normalizer: NormalizerFit = NormalizerFit()
  dpo: DPO = DPO()
  rollout: RolloutSettings = RolloutSettings()
  reward_shaping: RewardShaping = RewardShaping()
  ppo: PPO = PPO()
  compat: Compat = Compat()
  evaluate: Evaluate = Evaluate()
  evaluate_reward: EvaluateReward = EvaluateReward()
  sample: Sample = Sample()
  answers: Answers = Answers()
  checkpoint: CheckpointSettings = CheckpointSettings()
  report: Report = Report()
  demo: Demo = Demo()
  study: Study = Study()
  rewards: tuple[str, ...] = ()  # 'NAME path=DIR ...' or 'NAME fn=...': see segjax help rewards


def replace(settings: Any, **values: Any) -> Any:
  """Returns the settings with dotted keys replaced: replace(s, **{'data.path': 'x'})."""
  for key, value in values.items():
    section, _, name = key.partition('.')
    if name:
      value = replace(getattr(settings, section), **{name: value})
    settings = dataclasses.replace(settings, **{section: value})
  return settings
