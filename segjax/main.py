"""Parses the command line, sets up the devices, and runs the stages.

segjax JOB[:PRESET] [--workdir=...] [--config.KEY=VALUE ...]
python -m segjax.main --config=configs/JOB.py[:PRESET] ...     the same
segjax --help | --version | settings | metrics | help | plan | convert | replay

Stages are run by `segjax.jobs.pipeline`. jax is imported only if a run starts.
"""

import time

_STARTED = time.monotonic()  # before the imports, so that the run's wall time includes them

import functools
import io
import os
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

import segjax
from segjax import heap
from segjax.config import command_line, config_files, usage
from segjax.errors import UserError, one_line

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory or bucket of the run; default runs/<config>[-<preset>]-seed<seed>.'
)
_LOCAL_COPY = flags.DEFINE_string(
  'local_copy',
  str(Path.home() / '.cache' / 'segjax' / 'runs'),
  'Directory for the local copy of a --workdir on a bucket.',
)
_DRY_RUN = command_line.define_dry_run()
_PUSH_TO = flags.DEFINE_string(
  'push_to', '', 'OWNER/NAME on the Hugging Face hub: upload the last model at the end of the run.'
)
_PUSH_PUBLIC = flags.DEFINE_bool(
  'push_public', False, 'Make the repository of --push_to public, if it is new.'
)
_CACHE = flags.DEFINE_string(
  'compilation_cache_dir',
  os.environ.get('JAX_COMPILATION_CACHE_DIR', str(Path.home() / '.cache' / 'segjax')),
  'Directory in which compiled programs are kept between runs; empty: none.',
)
_TOKEN_CACHE = flags.DEFINE_string(
  'token_cache_dir',
  None,
  'Directory in which the tokens of large data sets are kept between runs; empty: none. Default: '
  '$SEGJAX_TOKEN_CACHE_DIR, else ~/.cache/segjax/tokens.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of the first process; SLURM and Cloud TPU slices need no flags.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', 0, 'Number of processes; with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', -1, 'Index of this process, from 0; with --coordinator.'
)
_JOIN_TIMEOUT = flags.DEFINE_float('join_timeout', 300.0, 'Seconds to wait for all processes.')


def default_workdir(config_file: str, seed: int) -> str:
  """Returns runs/<config>-<preset>-seed<seed> for the value of --config.

  Without a preset it is the one that the config takes by default; some have none.
  """
  path, _, preset = config_file.partition(':')
  parts = [Path(path).stem, preset or config_files.default_preset(path), f'seed{seed}']
  names = [re.sub(r'[^A-Za-z0-9_.]+', '-', part) for part in parts if part]
  return f'runs/{"-".join(names)}'


def main(_: list[str]) -> None:
  """Reads the settings, sets up the devices, runs the stages."""
  from segjax import processes
  from segjax.hf import upload
  from segjax.report.console import log

  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
    # transformers would warn that torch is missing, which segjax does not need.
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  settings, name = command_line.settings_from_flags()
  repository = upload.from_flags(_PUSH_TO.value, _PUSH_PUBLIC.value)
  log(f'segjax {name}\nstages {", ".join(settings.stages)}')

  if is_cpu_run():
    heap.keep_freed_memory()
  heap.take_gpu_memory()
  import jax

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  if _TOKEN_CACHE.value is not None:
    os.environ['SEGJAX_TOKEN_CACHE_DIR'] = _TOKEN_CACHE.value
  processes.initialize(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_TIMEOUT.value, has_tpu()
  )

  from segjax.jobs import dry_run, launch, pipeline, push
  from segjax.model.mesh import make_mesh
  from segjax.run import inputs, preemption
  from segjax.run.stage import Command

  mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
  axes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  log(f'devices {len(jax.devices())} x {jax.devices()[0].device_kind}, mesh {axes}')
  workdir, has_files = default_workdir(name, settings.seed), pipeline.writes_files(settings)
  if has_files:
    workdir = _WORKDIR.value or workdir
    log(f'output {workdir}')
  if _DRY_RUN.value:
    inputs.check_creatable('--workdir', workdir)
    stages = pipeline.prepare(settings, inputs.expand_path('--workdir', workdir), mesh)
    dry_run.run(settings, stages, is_full=_DRY_RUN.value == 'full')
    if repository:
      push.describe(repository, stages)
    return
  line = shlex.join(['python', '-m', 'segjax.main', *sys.argv[1:]])
  if has_files:
    preemption.interrupt_on_sigterm()
  launch.run(
    settings,
    workdir,
    mesh,
    Command(name, line),
    started=_STARTED,
    local_copy=_LOCAL_COPY.value,
    repository=repository,
  )


def has_tpu(devices: Path = Path('/dev')) -> bool:
  """Returns whether the machine has a TPU: accel0 ... up to v4, vfio/0 ... from v5e on."""
  return any(devices.glob('accel*')) or any(devices.glob('vfio/[0-9]*'))


def has_gpu(devices: Path = Path('/dev')) -> bool:
  """Returns whether the machine has a GPU of NVIDIA: nvidia0 ..., or dxg under Windows."""
  return any(devices.glob('nvidia[0-9]*')) or (devices / 'dxg').exists()


def is_cpu_run(devices: Path = Path('/dev')) -> bool:
  """Returns whether jax will compute on the CPU: JAX_PLATFORMS says so, or there is no other."""
  chosen = os.environ.get('JAX_PLATFORMS', '')
  return chosen == 'cpu' or not (chosen or has_tpu(devices) or has_gpu(devices))


def hide_unused_plugins(devices: Path = Path('/dev')) -> None:
  """Keeps jax from loading compilers that were installed for `segjax plan` alone.

  On a machine without a TPU libtpu would print warnings and look for a metadata server; without a
  GPU the CUDA plugin would print that it lacks the driver. Must be called before jax is imported. A
  platform that JAX_PLATFORMS names is the user's choice and not hidden.
  """
  chosen = os.environ.get('JAX_PLATFORMS', '')
  # A name that is None in sys.modules cannot be imported.
  if not has_tpu(devices) and not chosen:
    sys.modules['libtpu'] = None
  if not has_gpu(devices) and not {'cuda', 'gpu'} & set(chosen.split(',')):
    for version in ('12', '13'):
      sys.modules[f'jax_cuda{version}_plugin'] = None
      # jax warns about a plugin that it finds on disk and cannot import: this one does nothing.
      plugin = types.ModuleType(f'jax_plugins.xla_cuda{version}')
      plugin.initialize = lambda: None
      sys.modules[plugin.__name__] = plugin


def plan_command() -> Callable[[list[str]], None]:
  """Returns `segjax plan`; defines its flags."""
  from segjax.plan import cli

  def find_plan(job):
    from segjax.jobs import registry

    return registry.find_plan(job)

  return functools.partial(cli.main, find_plan=find_plan)


def cli() -> None:
  """Runs the console script `segjax`."""
  arguments = sys.argv[1:]
  if arguments[:1] == ['convert']:
    hide_unused_plugins()
    from segjax.hf import cli

    raise SystemExit(cli.main(arguments[1:]))
  if arguments[:1] == ['replay']:
    hide_unused_plugins()
    sys.path.insert(0, os.getcwd())  # reward functions are modules of the working directory
    from segjax.jobs import replay

    raise SystemExit(replay.main(arguments[1:]))
  run_main = main
  if arguments[:1] == ['plan']:
    del sys.argv[1], arguments[0]
    run_main = plan_command()
  try:
    text = answer(arguments)
    if text is None and arguments and not arguments[0].startswith('-'):
      # ml_collections reads the overrides --config.KEY=VALUE from sys.argv.
      sys.argv[1] = usage.config_argument(arguments[0])
  except UserError as error:
    raise SystemExit(f'segjax: {one_line(error)}') from None
  if text is not None:
    escape_unencodable()
    try:
      print(text.rstrip(), flush=True)
    except BrokenPipeError:  # as in `segjax settings | head`; nothing is left to flush at exit
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return
  if run_main is main:  # a plan is compiled by the plugins
    hide_unused_plugins()
  run(run_main)


def escape_unencodable() -> None:
  """Escapes printed characters that the encoding of the terminal lacks, as `é` in ASCII."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')


def answer(arguments: list[str]) -> str | None:
  """Returns the text that the arguments ask for; None if they start a run.

  Raises:
    UserError: a section, topic, metric or job does not exist.
  """
  command, name = (*arguments, '', '')[:2]
  if command == 'settings':
    from segjax.config import settings_table

    return settings_table.describe(name.removeprefix('config.'))
  if command == 'metrics':
    from segjax.report import metric_docs

    return metric_docs.plain_text(name)
  if command == 'help':
    return usage.topic(name) if name else usage.list_topics()
  if {'--help', '-h', '-help'} & set(arguments):
    job = command.partition(':')[0]
    return usage.overview() if job.startswith('-') else usage.topic(job)
  if '--version' in arguments:
    return f'segjax {segjax.__version__}'
  return None


def run(main: Callable[[list[str]], None]) -> None:
  """Runs `main` on the flags; wrong settings and inputs end in one line, not in a traceback."""
  # Config files import configs.shared, and reward functions are modules of the working directory.
  # `configs` is a namespace package: a user's own configs/ and the shipped one are both importable.
  sys.path.insert(0, os.getcwd())
  sys.path.append(str(config_files.shipped_root()))
  escape_unencodable()
  try:
    app.run(main, flags_parser=command_line.parse_flags)
  except KeyboardInterrupt:
    raise SystemExit('segjax: interrupted; the same command resumes from what is saved') from None
  except Exception as error:
    from segjax import lost_peers, processes

    _exit_if_preempted(error)
    if processes.process_count() > 1:
      if not is_user_error(error):
        processes.wait_for_culprit(error)
      lost_peers.mute()
    if os.environ.get('SEGJAX_TRACEBACK') or not is_user_error(error):
      raise
    raise SystemExit(f'segjax: {one_line(error)}') from None


def _exit_if_preempted(error: Exception) -> None:
  """Exits with the code that asks the scheduler to start the command again."""
  from segjax.run import preemption

  if isinstance(error, preemption.PreemptedError):
    print(f'segjax: {error}', file=sys.stderr)
    raise SystemExit(preemption.EXIT_CODE) from None


def is_user_error(error: Exception) -> bool:
  """Returns whether the user can fix the error; any other error keeps its traceback."""
  return isinstance(error, UserError)


if __name__ == '__main__':
  cli()
