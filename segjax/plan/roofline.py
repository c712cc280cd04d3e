"""How long a phase takes at least: the largest of what arithmetic, memory and links would take.

Model FLOPs and bytes are counted from the network, at 100 % of the chip's figures and with every
prompt and response as long as it may be. Real runs reach 40 to 60 % of them.
"""

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import Mesh

from segjax.config.settings import Optimizer, Settings
from segjax.model.chips import Chip
from segjax.model.flops import attended_pairs, forward_flops
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.model.mesh import mesh_sizes

PROMPTS = 60_000  # of UltraFeedback, an epoch


@dataclasses.dataclass(frozen=True)
class PhaseCost:
  """Of one device, in one phase of one step: FLOPs, bytes of its memory, bytes to other devices."""

  flops: float | int = 0.0
  memory: float | int = 0.0
  link: float | int = 0.0

  def seconds(self, chip: Chip) -> float:
    return max(self.flops / chip.flops, self.memory / chip.bandwidth, self.link / chip.link)

  def bound(self, chip: Chip) -> str:
    """What it waits for."""
    parts = {
      'arithmetic': self.flops / chip.flops,
      'memory': self.memory / chip.bandwidth,
      'links': self.link / chip.link,
    }
    return max(parts, key=lambda name: parts[name])


def ppo_step(s: Settings, networks: dict[str, LlamaConfig], mesh: Mesh) -> dict[str, PhaseCost]:
  """What a step of PPO is made of."""
  prompt, response, batch = (
    s.data.max_prompt_length,
    s.rollout.max_new_tokens,
    s.ppo.rollout_batch_size,
  )
  whole = prompt + response
  work = {'generation': _generation(s, networks['policy'], mesh)}
  pieces = batch // (s.ppo.scoring_batch_size or batch)
  scoring = [
    _forward(networks[name], head, mesh, batch, whole, pieces)
    for name, head in (('reference', 'language'), ('reward', 'scalar'), ('critic', 'scalar'))
    if name in networks
  ]
  work['scoring'] = _sum(scoring)
  updates = s.ppo.num_ppo_epochs * batch // s.ppo.minibatch_size
  micro = s.ppo.minibatch_size // (s.ppo.micro_batch_size or s.ppo.minibatch_size)
  for name, head, optimizer in (
    ('policy', 'language', s.ppo.policy_optimizer),
    ('critic', 'scalar', s.ppo.critic_optimizer),
  ):
    trained = _trained(s, optimizer, networks[name], head, mesh)
    rows = updates * s.ppo.minibatch_size
    work[f'{name} update'] = trained(rows, whole, updates * micro, updates)
  return work


def update(
  job: str, s: Settings, networks: dict[str, LlamaConfig], mesh: Mesh
) -> dict[str, PhaseCost]:
  """What a step of sft or reward training is made of."""
  settings, length = getattr(s, job), s.data.max_length
  pieces = settings.batch_size // (settings.micro_batch_size or settings.batch_size)
  if job == 'sft':
    trained = _trained(s, settings.optimizer, networks['policy'], 'language', mesh)
    return {'policy update': trained(settings.batch_size, length, pieces, 1)}
  trained = _trained(s, settings.optimizer, networks['reward'], 'scalar', mesh)
  rows = 2 * settings.batch_size
  work = {'reward model update': trained(rows, length, pieces, 1)}
  if 'reference' in networks and not settings.entropy_cache_dir:
    entropies = _forward(networks['reference'], 'language', mesh, rows, length, pieces)
    work['entropies'] = entropies
  return work


def _sum(parts: list[PhaseCost]) -> PhaseCost:
  return PhaseCost(*(sum(values) for values in zip(*map(dataclasses.astuple, parts), strict=True)))


def _weights(config: LlamaConfig) -> int:
  """Bytes in the compute dtype."""
  return num_parameters(config) * (2 if config.dtype == 'bfloat16' else 4)


def _gathered(config: LlamaConfig, mesh: Mesh) -> float:
  """Bytes that a device passes on while the weights are gathered along fsdp once."""
  at = mesh_sizes(mesh)
  return _weights(config) / at.tensor * (at.fsdp - 1) / at.fsdp


def _forward(
  config: LlamaConfig, head: str, mesh: Mesh, rows: int, length: int, pieces: int
) -> PhaseCost:
  flops = forward_flops(config, rows * length, rows * attended_pairs(length), head)
  read = _weights(config) / mesh_sizes(mesh).tensor * pieces
  return PhaseCost(flops / mesh.size, read, _gathered(config, mesh) * pieces)


def _trained(
  s: Settings, optimizer: Optimizer, config: LlamaConfig, head: str, mesh: Mesh
) -> Callable[[int, int, int, int], PhaseCost]:
  """(rows, length, micro-batches, updates) -> their work.

  Forward, backward and what remat does again; gradients are scattered, states read and written.
  """
  passes = 3 if config.remat == 'none' else 4
  itemsize = {'float32': 4, 'bfloat16': 2}
  state = itemsize[s.runtime.param_dtype] + 2 * itemsize[optimizer.moments_dtype]
  state = 2 * state * num_parameters(config) / mesh.size
  reads = passes - 1  # the backward pass needs the weights once for both of its products

  def work(rows: int, length: int, pieces: int, updates: int) -> PhaseCost:
    one = _forward(config, head, mesh, rows, length, pieces)
    return PhaseCost(
      flops=one.flops * passes,
      memory=one.memory * reads + state * updates,
      link=one.link * reads + 2 * _gathered(config, mesh) * pieces,
    )

  return work


def _generation(s: Settings, config: LlamaConfig, mesh: Mesh) -> PhaseCost:
  """Prompts are read once; each step reads all weights and the filled cache."""
  prompt, response, batch = (
    s.data.max_prompt_length,
    s.rollout.max_new_tokens,
    s.ppo.rollout_batch_size,
  )
  slots = min(s.rollout.max_concurrent or batch, batch)
  prompts = batch // s.rollout.samples_per_prompt
  flops = forward_flops(config, prompts * prompt, prompts * attended_pairs(prompt))
  pairs = batch * attended_pairs(prompt + response, prompt)
  flops += forward_flops(config, batch * response, pairs)
  steps = response * math.ceil(batch / slots)
  itemsize = 2 if config.dtype == 'bfloat16' else 4
  position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
  filled = slots * (prompt + response / 2) * position
  rows = mesh_sizes(mesh).data
  split = mesh.size // rows
  # Two sums of activations per layer over all devices that share the weights.
  passed = 2 * 2 * (split - 1) / split * slots / rows * config.hidden_size * itemsize
  return PhaseCost(
    flops=flops / mesh.size,
    memory=steps * (_weights(config) / split + filled / mesh.size),
    link=steps * config.num_hidden_layers * passed,
  )
