"""How jobs are laid out, by size of the model and TPU slice or GPU node.

Batches are packed and cut into pieces by tokens, and activations are kept for the backward pass as
far as the memory allows. This changes the results of a recipe by rounding only. `segjax plan` shows
that it fits.

Of a token and layer of 8B, 36 kB are kept with `_PROJECTIONS` and 92 kB with `_ALL`, in bfloat16;
of 70B 180 kB with `_ALL`. A minibatch of 128 responses has about 75,000 tokens, a batch of 128
pairs twice as many. Rows hold the longest sequence, and that takes several sequences for each group
of devices that share rows: where there are fewer, mesh.tensor makes the groups larger.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

# Recomputed in the backward pass: gate and up, or norms alone.
_PROJECTIONS = 'query,key,value,attention,residual'
_ALL = f'{_PROJECTIONS},gate,up'


def _settings(job: str, tokens: int, remat: str, **others: Any) -> dict[str, Any]:
  return {
    f'{job}.packing_length': 2048,  # the longest sequence of the recipes
    f'{job}.micro_batch_tokens': tokens,
    'runtime.remat': remat,
    **others,
  }


def _ppo(tokens: int, remat: str, scoring: int = 64, **others: Any) -> dict[str, Any]:
  return _settings('ppo', tokens, remat, **others) | {'ppo.scoring_batch_size': scoring}


def _reward(tokens: int, remat: str, **others: Any) -> dict[str, Any]:
  return _settings('reward', tokens, remat, **others)


# Adapters, whose base is the only network in full.
_LORA = {'lora.rank': 64}


def _one_host(
  settings: Callable[..., dict[str, Any]], gpu: int, tpu: int, **others: Any
) -> dict[str, dict[str, Any]]:
  """Returns the settings of a small model on one GPU and on a host of eight small TPUs.

  Args:
    settings: of the job, `_ppo` or `_reward`.
    gpu: tokens of a piece on the GPU.
    tpu: tokens of a piece on each TPU.
    others: further arguments of `settings`.
  """
  return {
    'cuda:1xH100-80GB': settings(gpu, _ALL, **others),
    'v5e:2x4': settings(tpu, _ALL, **others),
  }


TOPOLOGIES = {
  ('ppo', '8b'): {
    'v5p:2x2x2': _ppo(12_288, _ALL),
    'v6e:4x4': _ppo(6144, _PROJECTIONS),
    'v5e:8x8': _ppo(1536, _ALL, **{'mesh.tensor': 2}),
    'cuda:8xH100-80GB': _ppo(10_240, _ALL),
    'cuda:1xH100-80GB': _ppo(12_288, _ALL, scoring=16, **_LORA),
    'v5e:2x4': _ppo(2048, _PROJECTIONS, scoring=32, **_LORA),
  },
  ('ppo', '70b'): {
    'v5p:4x4x8': _ppo(768, _ALL, scoring=128, **{'mesh.tensor': 4}),
    # Groups lie within a node: no sum of a layer or of a decode step leaves it, and between nodes
    # each device gathers only a part of the weights.
    'cuda:8xH100-80GB': _ppo(2048, _ALL, scoring=32, **_LORA),
    'cuda:8x8xH100-80GB': _ppo(1536, _ALL, **{'mesh.tensor': 4, 'rollout.tensor': 8}),
  },
  ('reward', '8b'): {
    'v5p:2x2x2': _reward(12_288, _ALL),
    'v6e:4x4': _reward(12_288, _PROJECTIONS),
    'v5e:8x8': _reward(3072, _ALL),
    'cuda:8xH100-80GB': _reward(12_288, _ALL),
  },
  ('reward', '70b'): {'v5p:4x4x8': _reward(1536, _ALL, **{'mesh.tensor': 2})},
  # The ladder below 8B. All weights are trained, except by PPO of 3B. GiB of a device, read in the
  # compiled programs and not measured: generation, which takes as many rows as have room, 39 to
  # 63.5 of 68.5 (H100) and 8.4 to 14.5 of 15.7 (v5e); scoring 5 to 34 and 0.8 to 4.9; updates of
  # PPO 16 to 56 and 3.4 to 9.1; reward models 14 to 38, and of 3B 67.0 (H100), 6 to 11.6 (v5e).
  # Measured on an H100: PPO of 135M 38.1, of 3B 63.4; reward models of 135M 9.1, 1B 32.7, 3B 67.1.
  ('ppo', 'smollm2_135m'): _one_host(_ppo, 32_768, 8192, scoring=128),
  ('ppo', 'smollm2_360m'): _one_host(_ppo, 32_768, 8192, scoring=128),
  ('ppo', 'qwen25_05b'): _one_host(_ppo, 24_576, 6144),
  ('ppo', 'llama32_1b'): _one_host(_ppo, 16_384, 4096, scoring=32),
  ('ppo', 'llama32_3b'): {
    'cuda:1xH100-80GB': _ppo(16_384, _ALL, scoring=32, **_LORA),
    'v5e:2x4': _ppo(3072, _PROJECTIONS, scoring=32, **_LORA),
  },
  ('reward', 'smollm2_135m'): _one_host(_reward, 32_768, 16_384),
  ('reward', 'smollm2_360m'): _one_host(_reward, 32_768, 8192),
  ('reward', 'qwen25_05b'): _one_host(_reward, 24_576, 8192),
  ('reward', 'llama32_1b'): _one_host(_reward, 16_384, 6144),
  ('reward', 'llama32_3b'): {
    # The fewest tokens that hold a pair; with _PROJECTIONS it would take 68.7 GiB, and not fit.
    'cuda:1xH100-80GB': _reward(4096, 'attention'),
    'v5e:2x4': _reward(3072, _PROJECTIONS),
  },
  # Heads of 96 numbers, for which the GPU has no kernel: a dense view of the pages takes 36 GiB of
  # the 62 that generation takes there.
  ('ppo', 'phi3_mini'): {
    'cuda:8xH100-80GB': _ppo(12_288, _PROJECTIONS),
    'v5e:2x4': _ppo(2048, _PROJECTIONS, scoring=32, **_LORA),
  },
  ('reward', 'phi3_mini'): {
    'cuda:8xH100-80GB': _reward(12_288, _PROJECTIONS),
    'v5e:2x4': _reward(2048, _PROJECTIONS),
  },
}


def assign(config: ConfigDict, job: str, name: str, topology: str) -> None:
  """Assigns the settings of the job on the topology, for a model of `model_sizes.SIZES`."""
  if topology:
    config.update_from_flattened_dict(TOPOLOGIES[job, _size(name)][topology])


def names(job: str, name: str) -> tuple[str, ...]:
  """Returns the topologies that the job has settings for, with a model of that name."""
  return tuple(TOPOLOGIES.get((job, _size(name)), ()))


def _size(name: str) -> str:
  """Returns the size of `TOPOLOGIES` that a model has, or the name of one of another size."""
  return next((size for size in ('70b', '8b') if size in name), name)
