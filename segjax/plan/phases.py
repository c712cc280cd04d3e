"""A job as the planner sees it: its programs, their arguments, and how often a step calls them.

No array is created: parameters, optimizer states and batches are `jax.ShapeDtypeStruct`s.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays

TOTAL_STEPS = 100  # of the learning rate's schedule; changes no shape


@dataclasses.dataclass(frozen=True)
class Calls:
  """Calls of the program of a phase in a step, with texts of the drawn lengths.

  Attributes:
    number: of the calls. Where they have several shapes, those of one shape that do the same work.
    trips: iterations of its loop whose number only the program knows, on average over the calls.
    arguments: trees of shapes; None for those of the phase.
    pages: what kernels of paged attention read, see `DecodePrograms.bytes_read`.
    attended: share of the pairs of positions that kernels of attention compute, on average over
      rows: 1/2 if each has one sequence.
  """

  number: float | int
  trips: int = 1
  arguments: tuple[Any, ...] | None = None
  pages: Mapping[str, int] = dataclasses.field(default_factory=dict)
  attended: float = 0.5


def one_call() -> Calls:
  """Returns one call of a program without loops, with the arguments of its phase."""
  return Calls(1)


@dataclasses.dataclass(frozen=True)
class Phase:
  """One program of a job.

  Attributes:
    function: the jitted function; None if its program cannot be made.
    arguments: trees of shapes, for the longest texts.
    static: its static arguments.
    live: names in `JobPrograms.trees` of what lives on the devices during the phase.
    passed_in: names of the live trees, or of their parts, that are among the arguments.
    mesh: in whose context it runs; None for the training mesh.
    calls: returns its calls in a step, once they are needed; None for what is outside of steps.
    model_flops: of the updates of a step, on real tokens and all devices; 0 for other phases.
    refused: why it cannot fit, where that is known before its program is compiled.
    gradients: that an update has at once.
  """

  name: str
  function: Callable[..., Any] | None
  arguments: tuple[Any, ...]
  static: dict[str, Any]
  live: tuple[str, ...]
  passed_in: tuple[str, ...]
  mesh: Mesh | None = None
  calls: Callable[[], Calls] | None = one_call
  model_flops: float | int = 0
  refused: str = ''
  gradients: int = 1


@dataclasses.dataclass(frozen=True)
class JobPrograms:
  """The programs of a job and what lives on the devices between them.

  Attributes:
    trees: trees of shapes that live across phases, by name; 'X parameters' is a part of others.
    phases: in the order in which they run.
    configs: the networks by name, as they are run.
    tokens: of the texts of a step.
    responses_at_once: that all devices together decode; 0 for a job without rollouts.
    note: what the plan assumes of the rows, as a sentence; '' for nothing.
  """

  trees: dict[str, Any]
  phases: list[Phase]
  configs: dict[str, LlamaConfig]
  tokens: int
  responses_at_once: int = 0
  note: str = ''

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
    programs: (settings, network, mesh, bytes of a device, one of `lengths.KINDS` for the texts of
      a step) -> its programs.
    items_per_step: (settings) -> prompts or rows that a step takes.
    items: 'prompts' or 'rows'.
    batch_keys: keys of batch sizes that are divided over the devices.
    rows_at_once: (settings) -> those that trade memory for time, the cheapest first.
    optimizers: (settings) -> keys of optimizers, whose moments may be stored in fewer bits.
    has_frozen: whether it has frozen networks, which may be kept in host memory.
  """

  name: str
  programs: Callable[[Settings, LlamaConfig, Mesh, float | int, str], JobPrograms]
  items_per_step: Callable[[Settings], int]
  items: str
  batch_keys: tuple[str, ...]
  rows_at_once: Callable[[Settings], tuple[RowsAtOnce, ...]]
  optimizers: Callable[[Settings], tuple[str, ...]]
  has_frozen: bool = False


def refused_phase(name: str, message: str) -> Phase:
  """Returns a phase whose program cannot be made, for the reason in `message`."""
  return Phase(name, None, (), {}, live=(), passed_in=(), refused=message)


def lower_phase(phase: Phase, mesh: Mesh, arguments: tuple[Any, ...] | None = None) -> Any:
  """Traces the phase and lowers it for the platform of the training mesh's devices.

  Args:
    phase: the phase.
    mesh: of training.
    arguments: others than those of the phase.
  """
  mesh, arguments = phase.mesh or mesh, phase.arguments if arguments is None else arguments
  return abstract_arrays.lower(mesh, phase.function, arguments, phase.static)
