"""What every job is given, and what several of them do: loading models, reading data, training.

The jobs themselves hold no loops over steps: that is `train`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from segjax.data.encoding import Limits
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.hf import reader
from segjax.model import sharding
from segjax.model.llama import LlamaConfig
from segjax.report.console import say
from segjax.report.metrics import BadStepError, MetricLog
from segjax.settings import Settings
from segjax.train.checkpoint import Checkpointer
from segjax.train.state import TrainState

States = dict[str, TrainState]


@dataclasses.dataclass(frozen=True)
class Stage:
  """One job of a run: its settings, the directory it writes to, the devices."""

  name: str
  settings: Settings
  directory: Path
  mesh: Mesh

  @property
  def model_directory(self) -> Path:
    """Where the stage's finished model goes, in HF form."""
    return self.directory / 'model'

  def key(self, purpose: str) -> jax.Array:
    """A random key for `purpose`, from the run's seed and the stage's name."""
    key = jax.random.key(self.settings.seed)
    return jax.random.fold_in(key, _number(f'{self.name}/{purpose}'))

  def place(self, x: Any) -> jax.Array:
    """A host batch onto the mesh."""
    return sharding.place_batch(x, self.mesh)


def _number(name: str) -> int:
  """A number that stands for a name, the same in every process and on every machine."""
  import zlib

  return zlib.crc32(name.encode()) & 0x7FFFFFFF


def required(path: str, key: str) -> Path:
  """The directory of a checkpoint, fetched from the hub if it must be."""
  if not path:
    raise ValueError(f'config.{key} is empty; give an HF directory or a hub id: --config.{key}=...')
  return reader.resolve(path)


def network(stage: Stage, directory: Path, *, trained: bool = False) -> LlamaConfig:
  """The network in `directory`, run as config.runtime says.

  Raises:
    ValueError: its heads do not divide over the mesh's tensor axis.
  """
  runtime = stage.settings.runtime
  config = reader.load_config(
    directory,
    dtype=runtime.dtype,
    remat=runtime.remat and trained,
    attention=runtime.attention,
    logprob_chunk=runtime.logprob_chunk,
  )
  sharding.check_heads(config.num_attention_heads, config.num_key_value_heads, stage.mesh)
  return config


def load(
  stage: Stage, directory: Path, config: LlamaConfig, head: str, *, trained: bool = False
) -> Any:
  """The parameters in `directory`: float32 to be trained, else in the compute dtype."""
  dtype = 'float32' if trained else stage.settings.runtime.dtype
  return reader.load_params(
    directory, config, head, mesh=stage.mesh, dtype=dtype, key=stage.key('head')
  )


def tokenizer_of(stage: Stage, directory: Path) -> ChatTokenizer:
  """The tokenizer in `directory`, with the chat template of the config where it gives one."""
  return load_tokenizer(str(directory), stage.settings.data.chat_template)


def limits(stage: Stage, config: LlamaConfig) -> Limits:
  """Lengths of prompt and response together, never more than the network's positions.

  A network of fewer positions than config.data.max_length keeps the ratio of prompt to whole.
  """
  data = stage.settings.data
  most = config.max_position_embeddings
  if data.max_length <= most:
    return Limits(data.max_length, data.max_prompt_length, data.overlong)
  prompt = max(1, data.max_prompt_length * most // data.max_length)
  say(
    f'{stage.name}: the network has {most} positions, so rows are at most {most} tokens '
    f'(config.data.max_length={data.max_length}) and overlong prompts keep {prompt}.'
  )
  return Limits(most, prompt, data.overlong)


def describe(stage: Stage, dataset: Any) -> None:
  """One line on what was read: rows, length, what was cut and dropped."""
  counts = ', '.join(f'{v} {k.replace("_", " ")}' for k, v in dataset.counts.items() if v)
  say(f'{stage.name}: {counts}; {len(dataset)} kept, padded to {dataset.length} tokens')


def check_batch(key: str, size: int, stage: Stage) -> None:
  """ValueError unless a batch of `size` divides over the mesh; before anything is compiled."""
  sharding.check_batch(f'config.{key}={size}', size, stage.mesh)


def train(
  stage: Stage,
  states: States,
  step_fn: Callable[[States, int], tuple[States, dict[str, Any]]],
  total: int,
  show: list[str],
) -> tuple[States, dict[str, float]]:
  """Runs `step_fn` for `total` steps, with metrics, checkpoints and the watch over bad steps.

  Returns:
    The last states and the last step's metrics.

  Raises:
    BadStepError: after config.max_bad_steps updates in a row that were not finite; the state from
      before them is in the stage's `checkpoints`.
  """
  settings = stage.settings
  saved = Checkpointer(stage.directory / 'checkpoints', settings.checkpoint.keep)
  start = saved.latest() or 0
  if start:
    states = saved.restore(start, states)
    say(f'{stage.name}: going on from step {start} of {total} in {stage.directory}/checkpoints')
  log = MetricLog(stage.directory, stage.name, total, settings.max_bad_steps, show)
  try:
    with log:
      for step in range(start, total):
        states, metrics = step_fn(states, step)
        log.log(step, metrics)
        every = settings.checkpoint.every
        if every and (step + 1) % every == 0 and step + 1 < total:
          saved.save(step + 1, states)
  except BadStepError:
    # The jitted step kept the state from before the bad update.
    step = int(next(iter(states.values())).step)
    if step not in (saved.latest(), 0):
      saved.save(step, states)
    raise
  finally:
    saved.close()
  return states, log.last


def num_steps(steps: int, epochs: int, rows: int, batch: int, key: str) -> int:
  """`steps` if positive, else as many as `epochs` passes over `rows` give.

  Raises:
    ValueError: there are fewer rows than a batch has.
  """
  if rows < batch:
    raise ValueError(
      f'config.{key}.batch={batch} is more than the {rows} rows at hand; use at most {rows}.'
    )
  return steps or epochs * (rows // batch)
