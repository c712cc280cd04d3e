"""Limits of a run on models and data of the user's, which start small and on few devices.

They bound memory and change results by rounding only; `shared/topologies.py` has those of slices.
"""

from ml_collections import ConfigDict


def assign(config: ConfigDict) -> None:
  """Assigns how many rows go through the networks at once; a smaller batch goes as a whole."""
  config.sft.micro_batch_size = 16
  config.reward.micro_batch_size = 16
  config.dpo.micro_batch_size = 16
  config.ppo.micro_batch_size = 16
  config.ppo.scoring_batch_size = 64
  config.rollout.max_concurrent = 256
