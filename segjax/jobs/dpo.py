"""Trains the policy on preference pairs by Direct Preference Optimization (DPO).

Its log-probs relative to the reference are an implicit reward, for which DPO has the loss of a
reward model (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290). PPO reads them as rewards of
tokens with config.reward_shaping.lm_reward.
"""

from pathlib import Path
from typing import Any, NamedTuple

from segjax.data.batches import Pairs
from segjax.data.pairs_and_steps import PairsAndSteps
from segjax.jobs import pair_training
from segjax.jobs.pair_trainer import Network
from segjax.plan import programs
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.run.weights import Weights
from segjax.train import reward_spec
from segjax.train.implicit_scoring import ImplicitScorer


class Loaded(NamedTuple):
  """The policy, the directory of the reference, how pairs are scored, the pairs."""

  network: Network
  reference_path: Path
  scorer: ImplicitScorer
  pairs: Pairs


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  source = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  reference_path = inputs.resolve_checkpoint(s.reference.path, 'reference.path')
  config = models.load_trained_config(stage, 'dpo', source)
  reward_spec.check_tokenizer(source, reference_path)
  reference = models.load_network_config(reference_path, s.runtime, stage.mesh, stage.log)
  scorer = ImplicitScorer(config, reference, s.dpo.beta)
  tokenizer = inputs.load_chat_tokenizer(source, s.data)
  inputs.log_other_template(tokenizer, reference_path, s.data, stage.log)
  tokenizer = tokenizer.for_networks(scorer.networks)
  network = Network(source, config, 'language', tokenizer, 'dpo')
  rows = inputs.load_config_rows(s.data, stage.log)
  return Loaded(network, reference_path, scorer, pair_training.load_pairs(stage, network, rows))


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Trains config.policy.path on the pairs of config.data.path, against config.reference.path.

  Writes `model/`, a policy, and `held_out.json`.

  Returns:
    See `pair_training.run`; the scores are implicit rewards.
  """
  network, reference_path, scorer, pairs = loaded
  pair_training.check_ratings(stage, pairs)
  weights = Weights(stage.settings.runtime, stage.mesh)
  reference = weights.frozen(reference_path, scorer.reference, 'language')
  data = PairsAndSteps(pairs)
  return pair_training.run(stage, network, scorer, data, weights, reference)


JOB = pair_training.make_job(programs.DPO, load, run)
