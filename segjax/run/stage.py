"""What every job is given, and what several of them do: loading models, reading data, training.

The jobs themselves hold no loops over steps: that is `train`.
"""

import contextlib
import dataclasses
import functools
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from segjax import processes
from segjax.config.settings import PPO, SFT, CheckpointSettings, RewardTraining, Runtime, Settings
from segjax.data.batches import Pairs
from segjax.data.packing_plan import packing_efficiency, plan_packing
from segjax.data.sources import Rows, load_rows
from segjax.data.tokenize import Limits, PairRules, tokenize_pairs
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.errors import UserError
from segjax.hf import reader
from segjax.model import chips, sharding
from segjax.model.attention import select_implementation
from segjax.model.llama import LlamaConfig
from segjax.report.console import ProgressBar, log
from segjax.report.metric_log import MetricLog, Options, TooManySkippedStepsError
from segjax.report.profiling import Profiler
from segjax.run import preemption, stage_record
from segjax.run.bucket_mirror import NoMirror
from segjax.train.checkpoint import Checkpointer
from segjax.types import PackingPlan

States = dict[str, Any]  # TrainStates by name, and what else a step carries on

CHECKPOINTS = 'checkpoints'  # in a stage's directory


@dataclasses.dataclass(frozen=True)
class Command:
  """What a user gave to start a run: the config with its preset, and the whole line."""

  config: str = ''
  line: str = ''


@dataclasses.dataclass(frozen=True)
class Stage:
  """One job of a run: its settings, the directory it writes to, the devices.

  Attributes:
    mirror: keeps a bucket equal to the directory, if there is one.
    refresh: of what shows the run to people, after a step.
    command: what asked for it.
  """

  name: str
  settings: Settings
  directory: Path
  mesh: Mesh
  mirror: NoMirror = dataclasses.field(default_factory=NoMirror)
  refresh: Callable[[], None] = lambda: None
  command: Command = Command()

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

  def say(self, text: str) -> None:
    """A line of this stage on the console."""
    log(text, self.name)


def _number(name: str) -> int:
  """A number that stands for a name, the same in every process and on every machine."""
  return zlib.crc32(name.encode()) & 0x7FFFFFFF


def resolve_checkpoint(path: str, key: str) -> Path:
  """The directory of the checkpoint that config.`key` names, fetched from the hub if it must be."""
  try:
    return reader.resolve_checkpoint(path)
  except ValueError as error:
    raise UserError(f'config.{key}: {error}') from error


def load_config_rows(stage: Stage) -> Rows:
  """The rows of config.data."""
  data = stage.settings.data
  return load_rows(data.path, data.split, data.max_rows)


def load_network_config(stage: Stage, directory: Path, *, trained: bool = False) -> LlamaConfig:
  """The network in `directory`, run as config.runtime says.

  Raises:
    ValueError: its heads do not divide over the mesh's tensor axis.
  """
  config = reader.load_config(directory)
  config, reason = apply_runtime(config, stage.settings.runtime, stage.mesh, trained=trained)
  if reason:
    stage.say(reason)
  return config


def apply_runtime(
  config: LlamaConfig, runtime: Runtime, mesh: Mesh, *, trained: bool
) -> tuple[LlamaConfig, str]:
  """(The network as the runtime says, why its attention is not the one asked for, or '').

  Raises:
    ValueError: its heads do not divide over the mesh's tensor axis.
  """
  platform = mesh.devices.flat[0].platform
  attention, reason = select_implementation(
    runtime.attention, platform, runtime.compute_dtype, config.head_dim
  )
  config = dataclasses.replace(
    config,
    dtype=runtime.compute_dtype,
    remat=runtime.remat if trained else 'none',
    offload=runtime.offload_activations if trained else '',
    scan_unroll=runtime.scan_unroll,
    attention=attention,
    logprob_chunk=runtime.logprob_chunk_size,
  )
  sharding.check_heads(config.num_attention_heads, config.num_key_value_heads, mesh)
  return config, reason


def load_params(
  stage: Stage, directory: Path, config: LlamaConfig, head: str, *, trained: bool = False
) -> Any:
  """The parameters in `directory`, in the dtype of trained weights, or in the compute dtype."""
  runtime = stage.settings.runtime
  dtype = runtime.param_dtype if trained else runtime.compute_dtype
  return reader.load_params(
    directory, config, head, mesh=stage.mesh, dtype=dtype, key=stage.key('head')
  )


def log_memory(stage: Stage, trees: dict[str, Any]) -> None:
  """Says what each tree takes of a device, and of what; `tools/plan.py` tells what steps add."""
  sizes = {
    name: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    for name, tree in trees.items()
  }
  stats = stage.mesh.local_devices[0].memory_stats() or {}
  limit = f' of {stats["bytes_limit"] / 2**30:.1f}' if 'bytes_limit' in stats else ''
  parts = ', '.join(f'{name} {size / 2**30:.2f}' for name, size in sizes.items())
  stage.say(f'GiB per device{limit}: {parts}')


def plan_packing_for(
  settings: SFT | RewardTraining | PPO, lengths: np.ndarray, group: int = 1
) -> tuple[PackingPlan | None, dict[str, float]]:
  """(How sequences of these lengths are packed, the share of packed tokens that are real).

  None and {} where packing_length is 0.
  """
  if not settings.packing_length:
    return None, {}
  packing = plan_packing(lengths, settings.micro_batch_size, settings.packing_length, group)
  return packing, {'perf/packing_efficiency': packing_efficiency(packing)}


def prefix_metrics(prefix: str, metrics: dict[str, Any]) -> dict[str, Any]:
  """The metrics of a step by their names in the files; `bad` is `bad` everywhere."""
  return {k if k == 'skipped_updates' else f'{prefix}/{k}': value for k, value in metrics.items()}


def peak_flops(mesh: Mesh) -> float:
  """bfloat16 FLOP/s of all devices together; 0 where the vendor's figure is not known."""
  chip = chips.chip_for_kind(mesh.devices.flat[0].device_kind)
  return chip.flops * mesh.size if chip else 0.0


def load_stage_tokenizer(stage: Stage, directory: Path) -> ChatTokenizer:
  """The tokenizer in `directory`, with the chat template of the config where it gives one."""
  return load_tokenizer(str(directory), stage.settings.data.chat_template)


def length_limits(stage: Stage, config: LlamaConfig) -> Limits:
  """Lengths of prompt and response together, never more than the network's positions.

  A network of fewer positions than config.data.max_length keeps the ratio of prompt to whole.
  """
  data = stage.settings.data
  most = config.max_position_embeddings
  if data.max_length <= most:
    return Limits(data.max_length, data.max_prompt_length, data.overlong_policy)
  prompt = max(1, data.max_prompt_length * most // data.max_length)
  stage.say(
    f'rows are at most {most} tokens, for that many positions has the network '
    f'(config.data.max_length={data.max_length})'
  )
  return Limits(most, prompt, data.overlong_policy)


def prompt_limits(
  stage: Stage, networks: dict[str, LlamaConfig], section: str = 'rollout'
) -> Limits:
  """What of a prompt is kept: the networks' positions less config.`section`.max_new_tokens."""
  data = stage.settings.data
  new_tokens = functools.reduce(getattr, section.split('.'), stage.settings).max_new_tokens
  name, network = min(networks.items(), key=lambda item: item[1].max_position_embeddings)
  room = network.max_position_embeddings - new_tokens
  if room < 1:
    raise UserError(
      f'config.{section}.max_new_tokens={new_tokens} leaves no room for a prompt in the '
      f'{network.max_position_embeddings} positions of the {name}; make it smaller.'
    )
  most = min(data.max_prompt_length, room)
  if most < data.max_prompt_length:
    stage.say(
      f'prompts are at most {most} tokens, for the {name} has '
      f'{network.max_position_embeddings} positions and responses take up to {new_tokens}'
    )
  return Limits(most, most, data.overlong_policy)


def load_pairs(
  stage: Stage, tokenizer: ChatTokenizer, config: LlamaConfig, source: Rows | None = None
) -> Pairs:
  """The pairs of config.data, or of `source`, tokenised and cut to what the network holds."""
  compat = stage.settings.compat
  rules = PairRules(
    ratings=stage.name == 'reward' and stage.settings.reward.rating_margin_coef > 0,
    force_stop=compat.keep_degenerate_pairs,
    keep_identical=compat.keep_degenerate_pairs,
    strip_system_preamble=compat.strip_system_preamble,
  )
  return tokenize_pairs(
    source or load_config_rows(stage), tokenizer, length_limits(stage, config), rules
  )


def log_dataset(stage: Stage, dataset: Any) -> None:
  """One line on what was read: rows, length, what was cut and dropped."""
  counts = ', '.join(f'{v} {k.replace("_", " ")}' for k, v in dataset.counts.items() if v)
  left = '' if len(dataset) == dataset.counts['rows'] else f'; {len(dataset)} used'
  stage.say(f'{counts}{left}, padded to {dataset.length} tokens')


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
    TooManySkippedStepsError: after config.max_skipped_steps updates in a row that were not
    finite; the state, which
      those updates did not reach, is in the stage's `checkpoints`.
  """
  settings = stage.settings
  place = checkpoint_dir(stage)
  saved = _checkpointer(stage, place)
  start, states = saved.restore(states)
  if start:
    stage.say(f'going on from step {start} of {total}, saved in {place}')
  log = MetricLog(
    stage.directory,
    ProgressBar(stage.name, total, start),
    show,
    start=start,
    options=Options(
      settings.max_skipped_steps, settings.wandb_project, settings.log_every, peak_flops(stage.mesh)
    ),
  )
  done, is_due = start, CheckpointTimer(settings.checkpoint)
  profiler = Profiler(stage.directory, settings.profile_steps if processes.is_first() else '')
  try:
    with preemption.handle_signals(stage.say), log:
      for step in range(start, total):
        profiler.before(step + 1)
        with contextlib.suppress(preemption.StepAbortedError):
          states, metrics = step_fn(states, step)
          done = step + 1
          profiler.after(done, states)
          log.log(step, metrics)
          stage.refresh()
        is_asked = preemption.stop_requested()
        is_time = processes.any_process(is_due(done) and processes.is_first())
        if start < done < total and (is_asked or is_time):
          log.flush()  # so that no step before a checkpoint is ever without metrics
          if stage.mirror.offer():
            saved.save(done, states, log.evaluated | log.last)
        if is_asked and done < total:
          saved.settle()
          raise preemption.PreemptedError(_stop_message(stage.name, saved.latest(), done, total))
  except TooManySkippedStepsError as error:
    # The jitted step has kept the state from before each bad update, so this one is good.
    stage.mirror.offer()
    saved.save(done, states)
    at = f'{place}/{done}'
    raise TooManySkippedStepsError(
      f'{stage.name}, {error} The last good state is saved in {at}.'
    ) from None
  finally:
    profiler.close()
    saved.close()
  return states, log.last


def checkpoint_dir(stage: Stage) -> epath.Path:
  """Where the stage's training states go: config.checkpoint.directory, bucket or own directory."""
  elsewhere = stage.settings.checkpoint.directory
  if elsewhere:
    return epath.Path(elsewhere) / stage.name
  return stage.mirror.states(stage.directory) or epath.Path(stage.directory) / CHECKPOINTS


def _checkpointer(stage: Stage, place: epath.Path) -> Checkpointer:
  settings = stage.settings.checkpoint
  return Checkpointer(
    place,
    settings.max_to_keep,
    best=settings.best_metric,
    max_misses=settings.max_failures,
    run=stage_record.stored_key(stage.directory),
    differences=stage_record.changed_keys,
    say=stage.say,
  )


class CheckpointTimer:
  """Whether a checkpoint is to be saved now: by steps, or by the time since it last was."""

  def __init__(self, settings: CheckpointSettings):
    self._settings, self._last = settings, time.monotonic()

  def __call__(self, done: int) -> bool:
    every, seconds = self._settings.every_steps, self._settings.every_minutes * 60
    late = seconds > 0 and time.monotonic() - self._last >= seconds
    if not late and not (every and done % every == 0):
      return False
    self._last = time.monotonic()
    return True


def _stop_message(name: str, saved: int | None, done: int, total: int) -> str:
  where = f'step {saved} of {total} is saved' if saved else 'nothing is saved'
  lost = '' if saved == done else f' ({done} were done)'
  return f'{name} stopped as asked, {where}{lost}; the same command goes on from there'


def num_steps(steps: int, epochs: int, rows: int, batch: int, key: str) -> int:
  """`steps` if positive, else as many as `epochs` passes over `rows` give.

  Raises:
    ValueError: there are fewer rows than a batch has.
  """
  if rows < batch:
    raise UserError(
      f'config.{key}.batch_size={batch} is more than the {rows} rows at hand; use at most {rows}.'
    )
  return steps or epochs * (rows // batch)
