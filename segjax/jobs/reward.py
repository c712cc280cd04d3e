"""Trains the segment reward model: a scalar at the end of every segment.

From preference pairs, from labels of steps, or from rows of both forms in one run.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from segjax import processes
from segjax.config.settings import Segmentation, Settings
from segjax.data.pairs_and_steps import PairsAndSteps
from segjax.data.step_labels import has_step_labels
from segjax.data.tokenize import tokenize_steps
from segjax.data.tokenizer import ChatTokenizer
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.hf.adapter_config import tokenizer_directory
from segjax.jobs import pair_training, reward_calibration, reward_entropy_cache, step_training
from segjax.jobs.pair_trainer import Network
from segjax.plan import programs
from segjax.run import inputs, models
from segjax.run.labelled_rows import count_forms
from segjax.run.scorers import make_scorer
from segjax.run.stage import Stage
from segjax.run.weights import Weights
from segjax.train import reward_spec
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.reward_spec import RewardSpec


class Loaded(NamedTuple):
  """The network, the directory of the reference, how pairs are scored, the rows."""

  network: Network
  reference_path: Path
  scorer: SegmentScorer
  data: PairsAndSteps


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  if s.reward.entropy_cache_dir != 'run':
    inputs.check_creatable('config.reward.entropy_cache_dir', s.reward.entropy_cache_dir)
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  reference_path = inputs.resolve_checkpoint(s.reference.path, 'reference.path')
  config = models.load_trained_config(stage, 'reward', source)
  reward_spec.check_tokenizer(source, reference_path)
  tokenizer = inputs.load_chat_tokenizer(source, s.data)
  scorer = make_scorer(
    config,
    reference_path,
    s.reward.segmentation,
    tokenizer,
    s.runtime,
    stage.mesh,
    stage.log,
  )
  inputs.log_other_template(tokenizer, reference_path, s.data, stage.log)
  tokenizer = tokenizer.for_networks(scorer.networks)
  network = Network(source, config, 'scalar', tokenizer, 'reward_model')
  return Loaded(network, reference_path, scorer, _load_data(stage, network))


def _load_data(stage: Stage, network: Network) -> PairsAndSteps:
  """Tokenizes the rows of config.data, each by its form."""
  s, rows = stage.settings, inputs.load_config_rows(stage.settings.data, stage.log)
  limits = inputs.length_limits(s.data, network.config, stage.log)
  # The form of the first row is read first: at least this one row is of it.
  pairs = steps = None
  if not (starts_with_steps := has_step_labels(rows)):
    pairs = pair_training.load_pairs(stage, network, rows)
  if starts_with_steps or pairs.counts.get('with_steps'):
    steps = tokenize_steps(rows, network.tokenizer, limits)
    inputs.log_dataset(steps, stage.log)
  if starts_with_steps and steps.counts.get('pairs'):
    pairs = pair_training.load_pairs(stage, network, rows)
  data = PairsAndSteps(pairs, steps)
  step_training.check_columns(s.data.columns, data, rows)
  step_training.check_settings(s.reward, data, rows.name)
  return data


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Trains a reward model from config.policy.path's backbone on the rows of config.data.path.

  Responses of pairs are segmented by config.reward.segmentation, with the entropies or log-probs of
  config.reference.path if it reads any. Rows with labels of steps (`data.step_labels`) train the
  score at the ends of their steps; beside pairs by steps_weight, see `train.mixed_step`. Without
  pairs config.reward.segmentation is stored all the same. Writes `model/` with segment_reward.json,
  which has no normaliser yet, and `held_out.json`.

  Returns:
    See `pair_training.run`.
  """
  s = stage.settings
  network, reference_path, scorer, data = loaded
  weights, reference = Weights(s.runtime, stage.mesh), None
  if data.pairs is not None:
    pair_training.check_ratings(stage, data.pairs)
  if data.pairs is not None and scorer.segmenter.needs_reference:
    reference = weights.frozen(reference_path, scorer.reference, 'language')
    scorer = with_calibrated_threshold(stage, scorer, reference, network.tokenizer)
    if s.reward.entropy_cache_dir:
      pairs = reward_entropy_cache.with_ref_signals(
        stage, data.pairs, reference, reference_path, scorer
      )
      data = dataclasses.replace(data, pairs=pairs)
      reference = None
      weights.forget()  # frees its memory for training
  results = pair_training.run(stage, network, scorer, data, weights, reference)
  if processes.is_first():
    segmentation = scorer.segmenter.segmentation
    _write_reward_spec(stage.model_directory, network.source, segmentation)
  return results


def with_calibrated_threshold(
  stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: ChatTokenizer
) -> SegmentScorer:
  """Returns the scorer with the threshold of config.reward.threshold_search, if it is on."""
  search = stage.settings.reward.threshold_search
  if not search.target_segment_length and not search.entropy_quantile:
    return scorer
  threshold = reward_calibration.run(stage, scorer, reference, tokenizer)
  segmentation = dataclasses.replace(scorer.segmenter.segmentation, entropy_threshold=threshold)
  segmenter = dataclasses.replace(scorer.segmenter, segmentation=segmentation)
  return dataclasses.replace(scorer, segmenter=segmenter)


def _write_reward_spec(directory: Path, source: Path, segmentation: Segmentation) -> None:
  fingerprint = tokenizer_fingerprint(str(tokenizer_directory(source)))
  spec = RewardSpec(segmentation, normalizer=None, tokenizer_sha256=fingerprint)
  reward_spec.write_spec(directory, spec)


def _tokens_per_step(s: Settings) -> int:
  forms, size = count_forms(s.data), s.reward.batch_size
  pairs = size if forms is None or forms.pairs or not forms.labelled else 0
  labelled = forms.labelled_in_update(size) if forms else 0
  return (2 * pairs + labelled) * s.data.max_length


def _num_steps(s: Settings, rows: int) -> int:
  if rows and (forms := count_forms(s.data)) and forms.labelled:
    rows = forms.leading_rows(s.reward.batch_size)
  return pair_training.count_steps(s.reward, rows, 'reward')


def _describe_rows(s: Settings) -> str:
  forms = count_forms(s.data)
  return forms.describe(s.reward.batch_size) if forms else ''


JOB = dataclasses.replace(
  pair_training.make_job(
    programs.REWARD, load, run, functions=lambda s: ('reward.segmentation.boundary_fn',)
  ),
  tokens_per_step=_tokens_per_step,
  num_steps=_num_steps,
  describe_rows=_describe_rows,
)
