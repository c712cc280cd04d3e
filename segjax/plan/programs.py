"""The jitted programs of SFT and of reward training.

A phase calls the function that the job calls; the order of the calls is that of the job.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.lora import resolve_lora
from segjax.config.settings import Settings
from segjax.data.batches import TokenBatch
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays
from segjax.plan.lengths import draw_lengths
from segjax.plan.phases import TOTAL_STEPS, JobPlan, JobPrograms, Phase, RowsAtOnce
from segjax.plan.update_calls import update_calls
from segjax.run.models import apply_runtime
from segjax.train import throughput
from segjax.train.reward_scoring import SegmentScorer, evaluate_pairs
from segjax.train.reward_step import FrozenParams, reward_step
from segjax.train.segmenter import Segmenter
from segjax.train.sft_step import sft_step


def sft_programs(
  s: Settings, network: LlamaConfig, mesh: Mesh, _: float | int, lengths: str
) -> JobPrograms:
  """Returns the programs of SFT for a network of these sizes; see `JobPlan.programs`."""
  trained, frozen = _networks(s, network, mesh, 'sft')
  shape = s.sft.batch_size, s.data.max_length
  trees = {
    'policy state': abstract_arrays.state(trained, 'language', s.sft.optimizer, s, mesh),
    'rows': TokenBatch(
      abstract_arrays.batch(mesh, jnp.int32, *shape), abstract_arrays.batch(mesh, jnp.bool_, *shape)
    ),
  }
  base = ()
  if trained.lora:
    trees['base'] = abstract_arrays.params(frozen, 'language', s.runtime.compute_dtype, mesh)
    base = (trees['base'],)
  tokens = _row_lengths(s, lengths, s.sft.batch_size)
  largest, calls = update_calls(
    lambda packing: (trees['policy state'], trees['rows'], packing, *base),
    *(s.sft, tokens[None], s.data.max_length, mesh, trained),
  )
  phase = Phase(
    'policy update',
    sft_step,
    largest,
    {'config': trained, 'settings': s.sft, 'total_steps': TOTAL_STEPS},
    live=tuple(trees),
    passed_in=tuple(trees),
    calls=lambda: calls,
    model_flops=throughput.update(tokens, trained, 'language')[throughput.FLOPS],
  )
  return JobPrograms(trees, [phase], {'policy': trained}, int(tokens.sum()))


def reward_programs(
  s: Settings, network: LlamaConfig, mesh: Mesh, _: float | int, lengths: str
) -> JobPrograms:
  """Returns the programs of reward training for networks of these sizes; see `JobPlan.programs`."""
  trained, frozen = _networks(s, network, mesh, 'reward')
  scorer = SegmentScorer(trained, frozen, Segmenter(s.reward.segmentation))
  state = abstract_arrays.state(trained, 'scalar', s.reward.optimizer, s, mesh)
  trees = {'reward model state': state}
  weights = abstract_arrays.params(frozen, 'language', s.runtime.compute_dtype, mesh)
  if scorer.segmenter.needs_reference and not s.reward.entropy_cache_dir:
    trees['reference'] = weights
  elif trained.lora:
    trees['base'] = {'backbone': weights['backbone']}
  trees['pairs'] = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.pairs(s.reward.batch_size, s.data.max_length), mesh
  )
  live = tuple(trees)
  reference, pairs = trees.get('reference'), trees['pairs']
  base = {'backbone': weights['backbone']} if trained.lora else {}
  tokens = _row_lengths(s, lengths, 2 * s.reward.batch_size, samples=2)
  largest, calls = update_calls(
    lambda packing: (state, FrozenParams(reference, base), pairs, packing),
    *(s.reward, tokens[None], s.data.max_length, mesh, trained),
  )
  work = throughput.update(tokens, trained, 'scalar', frozen if reference else None)
  update = Phase(
    'reward model update',
    reward_step,
    largest,
    {'scorer': scorer, 'settings': s.reward, 'total_steps': TOTAL_STEPS},
    live=live,
    passed_in=live,
    calls=lambda: calls,
    model_flops=work[throughput.FLOPS],
  )
  trees['reward model parameters'] = state.params
  evaluation = Phase(
    'held-out pairs',
    evaluate_pairs,
    (base | state.params, reference, pairs),
    {'scorer': scorer},
    live=live,
    passed_in=('reward model parameters', *live[1:]),
    calls=None,
  )
  configs = {'reward': trained, 'reference': frozen}
  return JobPrograms(trees, [update, evaluation], configs, int(tokens.sum()))


def _networks(
  s: Settings, network: LlamaConfig, mesh: Mesh, name: str
) -> tuple[LlamaConfig, LlamaConfig]:
  """Returns the trained network, with the adapters of config.lora.`name`, and a frozen one."""
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  return dataclasses.replace(trained, lora=resolve_lora(s, name)), frozen


def _row_lengths(s: Settings, kind: str, count: int, samples: int = 1) -> np.ndarray:
  """Returns the tokens of `count` conversations, of which `samples` have the same prompt."""
  longest, prompt = s.data.max_length, s.data.max_prompt_length
  if kind == 'maximum':
    return np.full(count, longest)
  texts = draw_lengths(kind, count, prompt, longest, samples)
  return np.minimum(texts.total, longest)


SFT = JobPlan(
  name='sft',
  programs=sft_programs,
  items_per_step=lambda s: s.sft.batch_size,
  items='rows',
  batch_keys=('sft.batch_size', 'sft.micro_batch_size'),
  rows_at_once=(
    RowsAtOnce(
      'sft.micro_batch_size', 'sft.batch_size', ('policy update',), 'sft.micro_batch_tokens'
    ),
  ),
  optimizers=lambda s: ('sft.optimizer',),
)
REWARD = JobPlan(
  name='reward',
  programs=reward_programs,
  items_per_step=lambda s: s.reward.batch_size,
  items='rows',
  batch_keys=('reward.batch_size', 'reward.micro_batch_size'),
  rows_at_once=(
    RowsAtOnce(
      'reward.micro_batch_size',
      'reward.batch_size',
      ('reward model update',),
      'reward.micro_batch_tokens',
    ),
  ),
  optimizers=lambda s: ('reward.optimizer',),
)
