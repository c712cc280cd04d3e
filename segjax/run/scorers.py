"""Loads the models that score and annotate text: reward model, reference and segmentation."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import RewardModelSettings, Runtime, Segmentation, Settings
from segjax.data.batches import Pairs
from segjax.data.rows import Rows
from segjax.data.sources import Message
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation.annotate import Annotator
from segjax.model.llama import LlamaConfig
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.run.text_model import (
  check_messages,
  load_text_model,
  pair_prompt,
  reads_text,
)
from segjax.run.weights import Weights
from segjax.train import reward_spec
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.reward_spec import RewardSpec
from segjax.train.segmenter import make_segmenter
from segjax.train.text_reward import TextSegments
from segjax.types import PreferenceBatch

LogFn = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class LoadedRewardModel:
  """A reward model and its reference, before their weights are loaded.

  Attributes:
    path: its directory.
    reference: directory of the model whose entropies segment; None where none is needed.
    spec: segmentation and normaliser.
    scorer: networks and segmentation.
    tokenizer: of the tokens that are segmented: the reward model's, or the reference's if it reads
      text.
    text: how its scores are carried over to these tokens; None if it reads them itself.
  """

  path: Path
  reference: Path | None
  spec: RewardSpec
  scorer: SegmentScorer
  tokenizer: ChatTokenizer
  text: TextSegments | None = None

  @property
  def smallest(self) -> LlamaConfig:
    """The network with the fewest positions, of those that read the tokens."""
    networks = [self.scorer.reference]
    if self.text is None:
      networks.append(self.scorer.reward)
    return min(networks, key=lambda network: network.max_position_embeddings)

  def load_params(self, weights: Weights) -> tuple[Any, Any]:
    """Loads the parameters of the reward model and the reference; None of one that is not run."""
    params = weights.frozen(self.path, self.scorer.reward, 'scalar')
    if self.reference is None:
      return params, None
    return params, weights.frozen(self.reference, self.scorer.reference, 'language')

  def gather(
    self, stage: Stage, rows: Rows, params: Any, reference: Any
  ) -> Callable[[Pairs, np.ndarray], PreferenceBatch]:
    """Returns how pairs are put onto the devices: of a model that reads text, with its scores.

    Args:
      stage: places the tokens.
      rows: that the pairs come from.
      params: of `load_params`.
      reference: of `load_params`.
    """
    if self.text is None:
      return stage.gather

    def gather(pairs, index):
      prompts = [pair_prompt(rows, pairs, i)[1] for i in index]
      return self.text.add_pair_scores(params, reference, stage.gather(pairs, index), prompts)

    return gather

  def check_prompts(self, prompts: Iterable[tuple[str, list[Message]]]) -> None:
    """Raises UserError if the reward model's chat template refuses one of (location, prompt)."""
    if self.text is not None:
      check_messages(self.text.reward.scorer.tokenizer, self.path, prompts)


def load_reward_model(
  settings: Settings,
  how: RewardModelSettings,
  path: Path,
  reference: Path | None,
  mesh: Mesh,
  log: LogFn,
) -> LoadedRewardModel:
  """Finds out how a reward model reads rows of data; loads no weights.

  Texts are segmented on the tokens of the reward model, and by the entropies of the reference, if
  the two have one tokenizer and chat template. Else, or with a tag behind steps, they are segmented
  on the reference's, as PPO segments responses, and the reward model reads them as text. Without a
  reference they are always segmented on its own.

  Args:
    settings: `data`, `runtime` and `reward_shaping` are read.
    how: config.reward_model.
    path: directory of the reward model.
    reference: directory of the model whose tokens and entropies segment; None for no other.
    mesh: the devices.
    log: called with a line of text.

  Raises:
    UserError: boundaries read the reference and there is none, the reward model has no head, or
      its tokenizer is another and `how` says that it reads tokens.
  """
  base = reference or path
  is_text = reads_text(dataclasses.replace(settings, reward_model=how), path, base)
  spec = reward_spec.resolve_spec(how, path, None if is_text else base)
  own = base if is_text else path
  tokenizer = inputs.load_chat_tokenizer(own, settings.data, fallback=reference)
  if not make_segmenter(spec.segmentation, tokenizer).needs_reference:
    reference = None
  configs = models.load_network_configs(
    {'reward': path}, settings.runtime, mesh, log, {'reward': how}
  )
  config = configs['reward']
  scorer = make_scorer(config, reference, spec.segmentation, tokenizer, settings.runtime, mesh, log)
  if not is_text:
    tokenizer = tokenizer.for_networks(scorer.networks)
    return LoadedRewardModel(path, reference, spec, scorer, tokenizer)
  model = load_text_model(settings, path, config, spec, mesh, log)
  if reference is not None:
    tokenizer = tokenizer.for_networks({'reference': scorer.reference})
  text = TextSegments(model.reward(tokenizer), scorer)
  return LoadedRewardModel(path, reference, spec, scorer, tokenizer, text)


def make_scorer(
  reward: LlamaConfig,
  reference: Path | None,
  segmentation: Segmentation,
  tokenizer: ChatTokenizer,
  runtime: Runtime,
  mesh: Mesh,
  log: LogFn,
) -> SegmentScorer:
  """Returns how a reward model scores segments; loads no weights.

  Args:
    reward: network of the reward model.
    reference: directory of the model whose entropies segment; None if none is needed.
    segmentation: how text is segmented.
    tokenizer: of the reward model.
    runtime: config.runtime.
    mesh: the devices.
    log: called with a line of text.

  Raises:
    UserError: boundaries read the reference and there is none.
  """
  segmenter = make_segmenter(segmentation, tokenizer)
  models.warn_of_boundaries(segmentation, reward, log)
  if reference is not None:
    network = models.load_network_config(reference, runtime, mesh, log)
  elif segmenter.needs_reference:
    raise UserError(
      'config.reference.path is empty, but this reward model segments by the '
      f'{segmenter.signal} of its reference; give the SFT model that it was trained with.'
    )
  else:
    network = reward  # not run
  return SegmentScorer(reward, network, segmenter)


def load_annotator(
  reference: Path,
  reward: Path | None,
  settings: Settings,
  mesh: Mesh,
  log: LogFn,
  weights: Weights | None = None,
) -> Annotator:
  """Loads a reference and, where `reward` is not None, a reward model to annotate texts with.

  Text is segmented as segment_reward.json of the reward model says, if there is one, each field
  replaced where config.reward_model.segmentation sets it. A reward model of another tokenizer or
  chat template reads the texts by its own, see `load_reward_model`.

  Args:
    reference: directory of the model whose entropies segment.
    reward: directory of the reward model.
    settings: `reward_model`, `data.chat_template`, `reward_shaping` and `runtime` are read.
    mesh: the devices.
    log: called with a line of text.
    weights: loads them, to share what is loaded; None for weights of its own.

  Raises:
    UserError: the reward model has no scalar head, or reads text and a setting needs tokens.
  """
  stored, paths, is_text = None, {'reference': reference}, False
  if reward is not None:
    is_text = reads_text(settings, reward, reference)
    paths['reward'] = reward
    stored = reward_spec.read_spec(reward)
    if not is_text:
      reward_spec.check_tokenizer(reference, reward)
  how = settings.reward_model
  segmentation = reward_spec.override(stored.segmentation if stored else None, how.segmentation)
  tokenizer = inputs.load_chat_tokenizer(reference, settings.data)
  if reward is not None and not is_text:
    inputs.log_other_template(tokenizer, reward, settings.data, log)
  configs = models.load_network_configs(paths, settings.runtime, mesh, log, {'reward': how})
  read = {name: configs[name] for name in configs if name == 'reference' or not is_text}
  tokenizer, text = tokenizer.for_networks(read), None
  if is_text:
    spec = RewardSpec(segmentation, None)
    text = load_text_model(settings, reward, configs['reward'], spec, mesh, log).reward(tokenizer)
  models.warn_of_boundaries(segmentation, configs['reference'], log)
  weights = weights or Weights(settings.runtime, mesh)
  params = {
    name: weights.frozen(path, configs[name], models.HEADS[name]) for name, path in paths.items()
  }
  return Annotator(
    tokenizer=tokenizer,
    reference=configs['reference'],
    reward=configs.get('reward'),
    params=params,
    segmenter=make_segmenter(segmentation, tokenizer),
    normalizer=stored.normalizer if stored else None,
    std_floor_ratio=resolve_std_floor_ratio(settings.reward_shaping),
    mesh=mesh,
    text=text,
  )
