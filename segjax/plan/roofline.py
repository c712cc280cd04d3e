"""A lower bound on the time of a phase: the largest of its times for arithmetic, memory and links.

Model FLOPs and bytes are counted from the network, at 100 % of the chip's data sheet and with every
prompt and response of the maximum length. Real runs reach 40 to 60 % of it.
"""

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import Mesh

from segjax.config.settings import Optimizer, Settings
from segjax.model.chips import Chip
from segjax.model.flops import attended_pairs, forward_flops
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.model.mesh import decode_mesh, mesh_sizes

EPOCH_ROWS = 60_000  # prompts of UltraFeedback


@dataclasses.dataclass(frozen=True)
class PhaseCost:
  """What one phase of a step costs one device.

  Attributes:
    flops: floating-point operations.
    memory: bytes read from and written to its memory.
    link: bytes sent to other devices.
  """

  flops: float | int = 0.0
  memory: float | int = 0.0
  link: float | int = 0.0

  def seconds(self, chip: Chip) -> float:
    """Returns the time of the slowest of the three."""
    return max(self.flops / chip.flops, self.memory / chip.bandwidth, self.link / chip.link)

  def bound(self, chip: Chip) -> str:
    """Returns the name of the slowest of the three."""
    parts = {
      'arithmetic': self.flops / chip.flops,
      'memory': self.memory / chip.bandwidth,
      'links': self.link / chip.link,
    }
    return max(parts, key=lambda name: parts[name])


def ppo_step(s: Settings, configs: dict[str, LlamaConfig], mesh: Mesh) -> dict[str, PhaseCost]:
  """Returns the costs of a step of PPO by phase."""
  prompt, response, batch = (
    s.data.max_prompt_length,
    s.rollout.max_new_tokens,
    s.ppo.rollout_batch_size,
  )
  length = prompt + response
  costs = {'generation': _generation(s, configs['policy'], mesh)}
  pieces = batch // (s.ppo.scoring_batch_size or batch)
  scoring = [
    _forward(configs[name], head, mesh, batch, length, pieces)
    for name, head in (('reference', 'language'), ('reward', 'scalar'), ('critic', 'scalar'))
    if name in configs
  ]
  costs['scoring'] = _sum(scoring)
  updates = s.ppo.num_ppo_epochs * batch // s.ppo.minibatch_size
  micro = s.ppo.minibatch_size // (s.ppo.micro_batch_size or s.ppo.minibatch_size)
  for name, head, optimizer in (
    ('policy', 'language', s.ppo.policy_optimizer),
    ('critic', 'scalar', s.ppo.critic_optimizer),
  ):
    trained = _trained(s, optimizer, configs[name], head, mesh)
    rows = updates * s.ppo.minibatch_size
    costs[f'{name} update'] = trained(rows, length, updates * micro, updates)
  return costs


def sft_step(s: Settings, configs: dict[str, LlamaConfig], mesh: Mesh) -> dict[str, PhaseCost]:
  """Returns the cost of a step of SFT."""
  size = s.sft.batch_size
  pieces = size // (s.sft.micro_batch_size or size)
  trained = _trained(s, s.sft.optimizer, configs['policy'], 'language', mesh)
  return {'policy update': trained(size, s.data.max_length, pieces, 1)}


def reward_step(s: Settings, configs: dict[str, LlamaConfig], mesh: Mesh) -> dict[str, PhaseCost]:
  """Returns the costs of a step of reward training by phase."""
  size, length = s.reward.batch_size, s.data.max_length
  pieces, rows = size // (s.reward.micro_batch_size or size), 2 * size
  trained = _trained(s, s.reward.optimizer, configs['reward'], 'scalar', mesh)
  costs = {'reward model update': trained(rows, length, pieces, 1)}
  if 'reference' in configs and not s.reward.entropy_cache_dir:
    costs['entropies'] = _forward(configs['reference'], 'language', mesh, rows, length, pieces)
  return costs


def _sum(parts: list[PhaseCost]) -> PhaseCost:
  return PhaseCost(*(sum(values) for values in zip(*map(dataclasses.astuple, parts), strict=True)))


def _weights(config: LlamaConfig) -> int:
  """Returns the bytes of a network in the compute dtype."""
  return num_parameters(config) * (2 if config.dtype == 'bfloat16' else 4)


def _decode_weights(config: LlamaConfig, weights_dtype: str) -> int:
  """Returns the bytes of the weights that a decode step reads."""
  if weights_dtype != 'int8':
    return _weights(config)
  others = dataclasses.replace(config, num_hidden_layers=0)
  return _weights(others) + num_parameters(config) - num_parameters(others)  # a byte per weight


def _gathered(config: LlamaConfig, mesh: Mesh) -> float:
  """Returns the bytes that a device sends while the weights are gathered along fsdp once."""
  axes = mesh_sizes(mesh)
  # A ring: each device passes on all parts but one.
  return _weights(config) / axes.tensor * (axes.fsdp - 1) / axes.fsdp


def _forward(
  config: LlamaConfig, head: str, mesh: Mesh, rows: int, length: int, pieces: int
) -> PhaseCost:
  flops = forward_flops(config, rows * length, rows * attended_pairs(length), head)
  # Gathered along fsdp, so that each device reads all of them for every piece.
  read = _weights(config) / mesh_sizes(mesh).tensor * pieces
  return PhaseCost(flops / mesh.size, read, _gathered(config, mesh) * pieces)


def _trained(
  s: Settings, optimizer: Optimizer, config: LlamaConfig, head: str, mesh: Mesh
) -> Callable[[int, int, int, int], PhaseCost]:
  """Returns a function (rows, length, micro-batches, updates) -> cost of the updates.

  Counts forward, backward and the recomputation of remat; gradients are scattered, states are read
  and written.
  """
  # A backward pass costs two forward passes: gradients of inputs and of weights.
  passes = 3 if config.remat == 'none' else 4
  itemsize = {'float32': 4, 'bfloat16': 2}
  state = itemsize[s.runtime.param_dtype] + 2 * itemsize[optimizer.moments_dtype]
  state = 2 * state * num_parameters(config) / mesh.size  # read and written
  reads = passes - 1  # the backward pass needs the weights once for both of its products

  def cost(rows: int, length: int, pieces: int, updates: int) -> PhaseCost:
    forward = _forward(config, head, mesh, rows, length, pieces)
    return PhaseCost(
      flops=forward.flops * passes,
      memory=forward.memory * reads + state * updates,
      link=forward.link * reads + 2 * _gathered(config, mesh) * pieces,
    )

  return cost


def _generation(s: Settings, config: LlamaConfig, mesh: Mesh) -> PhaseCost:
  """Returns the cost of generation: each decode step reads all weights and the filled pages."""
  prompt, response, batch = (
    s.data.max_prompt_length,
    s.rollout.max_new_tokens,
    s.ppo.rollout_batch_size,
  )
  slots = min(s.rollout.max_concurrent or batch, batch)
  prompts = batch // s.rollout.samples_per_prompt
  # All samples of a prompt share its prefill.
  flops = forward_flops(config, prompts * prompt, prompts * attended_pairs(prompt))
  pairs = batch * attended_pairs(prompt + response, prompt)
  flops += forward_flops(config, batch * response, pairs)
  steps = response * math.ceil(batch / slots)
  itemsize = 2 if config.dtype == 'bfloat16' else 4
  position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
  filled = slots * (prompt + response / 2) * position  # on average half of the response
  groups, _, tensor = mesh_sizes(
    decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads, s.rollout.tensor)
  )
  rows, others = slots / groups, (tensor - 1) / tensor
  weights = _decode_weights(config, s.rollout.weights_dtype)
  # Two sums of activations per layer over a group, and float32 logits once, for sampling.
  sums = config.num_hidden_layers * 2 * 2 * others * rows * config.hidden_size * itemsize
  logits = others * rows * config.vocab_size / tensor * 4
  return PhaseCost(
    flops=flops / mesh.size,
    memory=steps * (weights / tensor + filled / mesh.size),
    link=steps * (sums + logits),
  )
