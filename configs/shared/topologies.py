"""Batch sizes of 8B and 70B jobs by TPU slice or GPU node.

They change the results of a recipe by rounding only. `tools/plan.py` shows that they fit.
"""

from ml_collections import ConfigDict

_PPO_8B = {'ppo.micro_batch_size': 16, 'ppo.scoring_batch_size': 64}
# A group of eight decodes within a node, so that no sum of a step leaves it.
_PPO_70B_GPU = {
  'ppo.micro_batch_size': 64,
  'ppo.scoring_batch_size': 64,
  'rollout.tensor': 8,
}
TOPOLOGIES = {
  ('ppo', '8b'): {
    'v5p:2x2x2': _PPO_8B,
    'v6e:4x4': _PPO_8B,
    'v5e:8x8': _PPO_8B | {'ppo.micro_batch_size': 64},
    'cuda:8xH100-80GB': _PPO_8B | {'ppo.micro_batch_size': 8},
  },
  ('ppo', '70b'): {
    'v5p:4x4x8': {'ppo.micro_batch_size': 128, 'ppo.scoring_batch_size': 128},
    'cuda:8x8xH100-80GB': _PPO_70B_GPU,
  },
  ('reward', '8b'): {
    'v5p:2x2x2': {'reward.micro_batch_size': 16},
    'v6e:4x4': {'reward.micro_batch_size': 16},
    'v5e:8x8': {'reward.micro_batch_size': 64},
    'cuda:8xH100-80GB': {'reward.micro_batch_size': 8},
  },
  ('reward', '70b'): {'v5p:4x4x8': {'reward.micro_batch_size': 128}},
}


def assign(config: ConfigDict, job: str, name: str, topology: str) -> None:
  """Assigns the batch sizes of the job on the topology, for a model of `model_sizes.SIZES`."""
  if topology:
    config.update_from_flattened_dict(TOPOLOGIES[job, _size(name)][topology])


def names(job: str, name: str) -> tuple[str, ...]:
  """Returns the topologies that the job has batch sizes for, with a model of that name."""
  return tuple(TOPOLOGIES.get((job, _size(name)), ()))


def _size(name: str) -> str:
  return '70b' if '70b' in name else '8b'
