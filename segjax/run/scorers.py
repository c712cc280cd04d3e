"""Loads the models that score and annotate text: reward model, reference and segmentation."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import Runtime, Segmentation, Settings
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation.annotate import Annotator
from segjax.model.llama import LlamaConfig
from segjax.run import inputs, models
from segjax.run.text_model import check_no_tags
from segjax.run.weights import Weights
from segjax.train import reward_spec
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.segmenter import make_segmenter

LogFn = Callable[[str], None]


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
  replaced where config.reward_model.segmentation sets it.

  Args:
    reference: directory of the model whose entropies segment.
    reward: directory of the reward model.
    settings: `reward_model.segmentation`, `data.chat_template`, `reward_shaping` and `runtime`
      are read.
    mesh: the devices.
    log: called with a line of text.
    weights: loads them, to share what is loaded; None for weights of its own.

  Raises:
    UserError: the tokenizers differ, or the reward model has no scalar head.
  """
  stored, paths = None, {'reference': reference}
  if reward is not None:
    check_no_tags(settings.reward_model, 'this command')
    paths['reward'] = reward
    stored = reward_spec.read_spec(reward)
    reward_spec.check_tokenizer(reference, reward)
  segmentation = reward_spec.override(
    stored.segmentation if stored else Segmentation(), settings.reward_model.segmentation
  )
  tokenizer = inputs.load_chat_tokenizer(reference, settings.data)
  if reward is not None:
    inputs.log_other_template(tokenizer, reward, settings.data, log)
  configs = models.load_network_configs(paths, settings.runtime, mesh, log, settings.reward_model)
  tokenizer = tokenizer.for_networks(configs)
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
  )
