"""The jitted programs of a job, with the shapes and layouts of their arguments; SFT, reward model.

No array is created: parameters, optimizer states and batches are `jax.ShapeDtypeStruct`s. A phase
calls the function that the job calls; the order of the calls is that of the job.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.data.batches import TokenBatch
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays, roofline
from segjax.plan.roofline import PhaseCost
from segjax.run.models import apply_runtime
from segjax.train.reward_scoring import SegmentScorer, evaluate_pairs
from segjax.train.reward_step import reward_step
from segjax.train.segmenter import Segmenter
from segjax.train.sft_step import sft_step

TOTAL_STEPS = 100  # of the learning rate's schedule; changes no shape


@dataclasses.dataclass(frozen=True)
class Phase:
  """One program of a job.

  Attributes:
    function: the jitted function.
    arguments: trees of shapes.
    static: its static arguments.
    live: names in `JobPrograms.trees` of what lives on the devices during the phase.
    passed_in: names of the live trees, or of their parts, that are among the arguments.
    mesh: in whose context it runs; None for the training mesh.
  """

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  static: dict[str, Any]
  live: tuple[str, ...]
  passed_in: tuple[str, ...]
  mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class JobPrograms:
  """The programs of a job and what lives on the devices between them.

  Attributes:
    trees: trees of shapes that live across phases, by name; 'X parameters' is a part of 'X state'.
    phases: in the order in which they run.
    configs: the networks by name, as they are run.
  """

  trees: dict[str, Any]
  phases: list[Phase]
  configs: dict[str, LlamaConfig]

  def sizes(self) -> dict[str, int]:
    """Returns the bytes per device of each tree; trees that are parts of others are left out."""
    trees = {k: tree for k, tree in self.trees.items() if not k.endswith(' parameters')}
    return {name: abstract_arrays.bytes_per_device(tree) for name, tree in trees.items()}


@dataclasses.dataclass(frozen=True)
class RowsAtOnce:
  """A setting that bounds how many rows some phases have on the devices at once.

  Attributes:
    key: the config key; 0 means all rows.
    total_key: the key of all rows.
    phases: names of the phases.
    tokens_key: a key that counts tokens of a device instead, where that is set.
  """

  key: str
  total_key: str
  phases: tuple[str, ...]
  tokens_key: str = ''


@dataclasses.dataclass(frozen=True)
class JobPlan:
  """What the planner needs to know about a job.

  Attributes:
    name: of the job.
    programs: (settings, network, mesh, bytes of a device) -> its programs.
    costs: (settings, networks by name, mesh) -> what each phase of a step costs.
    items_per_step: (settings) -> prompts or rows that a step takes.
    items: 'prompts' or 'rows'.
    batch_keys: keys of batch sizes that are divided over the devices.
    rows_at_once: settings that trade memory for time, the cheapest first.
    optimizers: keys of optimizers, whose moments may be stored in fewer bits.
    has_frozen: whether it has frozen networks, which may be kept in host memory.
  """

  name: str
  programs: Callable[[Settings, LlamaConfig, Mesh, float | int], JobPrograms]
  costs: Callable[[Settings, dict[str, LlamaConfig], Mesh], dict[str, PhaseCost]]
  items_per_step: Callable[[Settings], int]
  items: str
  batch_keys: tuple[str, ...]
  rows_at_once: tuple[RowsAtOnce, ...]
  optimizers: tuple[str, ...]
  has_frozen: bool = False


def lower_phase(phase: Phase, mesh: Mesh) -> Any:
  """Traces the phase and lowers it for the platform of the training mesh's devices."""
  return abstract_arrays.lower(phase.mesh or mesh, phase.function, phase.arguments, phase.static)


def sft_programs(s: Settings, network: LlamaConfig, mesh: Mesh, _: float | int) -> JobPrograms:
  """Returns the programs of SFT for a network of these sizes."""
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  shape = s.sft.batch_size, s.data.max_length
  trees = {
    'policy state': abstract_arrays.state(trained, 'language', s.sft.optimizer, s, mesh),
    'rows': TokenBatch(
      abstract_arrays.batch(mesh, jnp.int32, *shape), abstract_arrays.batch(mesh, jnp.bool_, *shape)
    ),
  }
  packing = abstract_arrays.packing(s.sft, s.sft.batch_size, mesh)
  phase = Phase(
    'policy update',
    sft_step,
    (trees['policy state'], trees['rows'], packing),
    {'config': trained, 'settings': s.sft, 'total_steps': TOTAL_STEPS},
    live=tuple(trees),
    passed_in=tuple(trees),
  )
  return JobPrograms(trees, [phase], {'policy': trained})


def reward_programs(s: Settings, network: LlamaConfig, mesh: Mesh, _: float | int) -> JobPrograms:
  """Returns the programs of reward training for networks of these sizes."""
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  scorer = SegmentScorer(trained, frozen, Segmenter(s.reward.segmentation))
  state = abstract_arrays.state(trained, 'scalar', s.reward.optimizer, s, mesh)
  trees = {'reward model state': state}
  if scorer.segmenter.needs_entropy and not s.reward.entropy_cache_dir:
    trees['reference'] = abstract_arrays.params(frozen, 'language', s.runtime.compute_dtype, mesh)
  trees['pairs'] = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.pairs(s.reward.batch_size, s.data.max_length), mesh
  )
  live = tuple(trees)
  reference, pairs = trees.get('reference'), trees['pairs']
  packing = abstract_arrays.packing(s.reward, 2 * s.reward.batch_size, mesh, group=2)
  update = Phase(
    'reward model update',
    reward_step,
    (state, reference, pairs, packing),
    {'scorer': scorer, 'settings': s.reward, 'total_steps': TOTAL_STEPS},
    live=live,
    passed_in=live,
  )
  trees['reward model parameters'] = state.params
  evaluation = Phase(
    'held-out pairs',
    evaluate_pairs,
    (state.params, reference, pairs),
    {'scorer': scorer},
    live=live,
    passed_in=('reward model parameters', *live[1:]),
  )
  return JobPrograms(trees, [update, evaluation], {'reward': trained, 'reference': frozen})


SFT = JobPlan(
  name='sft',
  programs=sft_programs,
  costs=roofline.sft_step,
  items_per_step=lambda s: s.sft.batch_size,
  items='rows',
  batch_keys=('sft.batch_size', 'sft.micro_batch_size'),
  rows_at_once=(
    RowsAtOnce(
      'sft.micro_batch_size', 'sft.batch_size', ('policy update',), 'sft.micro_batch_tokens'
    ),
  ),
  optimizers=('sft.optimizer',),
)
REWARD = JobPlan(
  name='reward',
  programs=reward_programs,
  costs=roofline.reward_step,
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
  optimizers=('reward.optimizer',),
)
