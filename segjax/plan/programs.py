"""The jitted programs of SFT, of reward training and of DPO.

A phase calls the function that the job calls; the order of the calls is that of the job.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.lora import resolve_lora
from segjax.config.settings import Settings
from segjax.data.batches import TokenBatch
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays, label_programs
from segjax.plan.lengths import draw_lengths
from segjax.plan.phases import TOTAL_STEPS, JobPlan, JobPrograms, Phase, RowsAtOnce
from segjax.plan.update_calls import update_calls
from segjax.run.inputs import with_stage_data
from segjax.run.labelled_rows import count_forms, labelled_at_once
from segjax.run.network_runtime import apply_runtime
from segjax.train import throughput
from segjax.train.implicit_scoring import ImplicitScorer
from segjax.train.preference_step import FrozenParams, preference_step
from segjax.train.reward_scoring import PairScorer, SegmentScorer, evaluate_pairs
from segjax.train.segmenter import Segmenter
from segjax.train.sft_step import sft_step

_PAIRS_ALONE = (
  'planned for pairs alone, as config.data.path has no rows on this machine; with labelled steps '
  'beside them an update takes a second gradient and the memory of these rows'
)


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
  base = {'backbone': weights['backbone']} if trained.lora else {}
  forms = count_forms(with_stage_data(s, 'reward').data)
  size, piece = s.reward.batch_size, labelled_at_once(s.reward, mesh)
  count = forms.labelled_in_update(size, piece) if forms else 0
  if count and not forms.pairs:
    labelled = _row_lengths(s, lengths, count)
    programs = label_programs.labels_alone(s, trained, state, base, labelled, mesh)
    return dataclasses.replace(programs, note=forms.describe(size))
  has_signal = scorer.segmenter.needs_reference and bool(s.reward.entropy_cache_dir)
  if scorer.segmenter.needs_reference and not has_signal:
    trees['reference'] = weights
  elif base:
    trees['base'] = base
  job = _PairJob('reward', 'reward model', 'scalar', trained, base, has_signal)
  programs = _pair_programs(s, job, scorer, trees, mesh, lengths)
  if not count:
    return dataclasses.replace(programs, note='' if forms and forms.pairs else _PAIRS_ALONE)
  labelled = _row_lengths(s, lengths, count)
  programs = label_programs.with_labels(programs, s, trained, labelled, mesh)
  return dataclasses.replace(programs, note=forms.describe(size, piece))


def dpo_programs(
  s: Settings, network: LlamaConfig, mesh: Mesh, _: float | int, lengths: str
) -> JobPrograms:
  """Returns the programs of DPO for networks of these sizes; see `JobPlan.programs`."""
  trained, frozen = _networks(s, network, mesh, 'dpo')
  scorer = ImplicitScorer(trained, frozen, s.dpo.beta)
  weights = abstract_arrays.params(frozen, 'language', s.runtime.compute_dtype, mesh)
  state = abstract_arrays.state(trained, 'language', s.dpo.optimizer, s, mesh)
  trees = {'policy state': state, 'reference': weights}
  job = _PairJob('dpo', 'policy', 'language', trained, weights if trained.lora else {})
  return _pair_programs(s, job, scorer, trees, mesh, lengths)


class _PairJob(NamedTuple):
  """Section, and the name, head, network and frozen base of what is trained on pairs.

  `has_signal`: whether pairs hold what boundaries read of the reference, which is not run then.
  """

  section: str
  name: str
  head: str
  network: LlamaConfig
  base: Any
  has_signal: bool = False


def _pair_programs(
  s: Settings,
  job: _PairJob,
  scorer: PairScorer,
  trees: dict[str, Any],
  mesh: Mesh,
  lengths: str,
) -> JobPrograms:
  """Returns the update on pairs and the evaluation of held-out ones.

  Args:
    s: the settings.
    job: what is trained.
    scorer: how pairs are scored.
    trees: its state, and the frozen networks.
    mesh: the devices.
    lengths: of the texts.
  """
  settings = getattr(s, job.section)
  trees['pairs'] = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.pairs(settings.batch_size, s.data.max_length, job.has_signal), mesh
  )
  live = tuple(trees)
  state, reference, pairs = trees[live[0]], trees.get('reference'), trees['pairs']
  tokens = _row_lengths(s, lengths, 2 * settings.batch_size, samples=2)
  largest, calls = update_calls(
    lambda packing: (state, FrozenParams(reference, job.base), pairs, packing),
    *(settings, tokens[None], s.data.max_length, mesh, job.network),
  )
  frozen = scorer.reference if reference else None
  update = Phase(
    f'{job.name} update',
    preference_step,
    largest,
    {'scorer': scorer, 'settings': settings, 'total_steps': TOTAL_STEPS},
    live=live,
    passed_in=live,
    calls=lambda: calls,
    model_flops=throughput.update(tokens, job.network, job.head, frozen)[throughput.FLOPS],
  )
  parameters = f'{job.name} parameters'
  trees[parameters] = state.params
  evaluation = Phase(
    'held-out pairs',
    evaluate_pairs,
    (job.base | state.params, reference, pairs),
    {'scorer': scorer},
    live=live,
    passed_in=(parameters, *live[1:]),
    calls=None,
  )
  configs = {job.name.split()[0]: job.network, 'reference': scorer.reference}
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
  rows_at_once=lambda s: (
    RowsAtOnce(
      'sft.micro_batch_size', 'sft.batch_size', ('policy update',), 'sft.micro_batch_tokens'
    ),
  ),
  optimizers=lambda s: ('sft.optimizer',),
)


def _plan_pairs(section: str, programs: Callable[..., JobPrograms], update: str) -> JobPlan:
  """Returns the plan of a job that trains on pairs, whose phase `update` has micro-batches."""
  rows, total = f'{section}.micro_batch_size', f'{section}.batch_size'
  return JobPlan(
    name=section,
    programs=programs,
    items_per_step=lambda s: getattr(s, section).batch_size,
    items='rows',
    batch_keys=(total, rows),
    rows_at_once=lambda s: (RowsAtOnce(rows, total, (update,), f'{section}.micro_batch_tokens'),),
    optimizers=lambda s: (f'{section}.optimizer',),
  )


REWARD = _plan_pairs('reward', reward_programs, 'reward model update')
DPO = _plan_pairs('dpo', dpo_programs, 'policy update')
