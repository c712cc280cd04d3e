"""The command line: flags, devices, one call. The work is in `segjax.jobs`.

python -m segjax.main --config=configs/ppo.py[:preset] [--workdir=...] [--config.KEY=VALUE ...]
python -m segjax.main convert import|export|verify|inspect ...
"""

import time

from segjax.errors import UserError

_STARTED = time.time()

import os  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from segjax import processes  # noqa: E402
from segjax.config.settings import Settings  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file of configs/, with its preset: configs/ppo.py:local.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run writes; default runs/<config>-<preset>-seed<seed>.'
)
_MIRROR = flags.DEFINE_string(
  'mirror',
  str(Path.home() / '.cache' / 'segjax' / 'runs'),
  'Where the local copy of a --workdir on a bucket is kept.',
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Resolve, check and print the config with its counts; load no weights.'
)
_PROFILE = flags.DEFINE_string(
  'profile_steps', '', 'first:last; these steps of every stage are traced into <stage>/profile.'
)
_CACHE = flags.DEFINE_string(
  'compilation_cache',
  os.environ.get('JAX_COMPILATION_CACHE_DIR', str(Path.home() / '.cache' / 'segjax')),
  'Where compiled programs are kept between runs; empty for nowhere.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', '', 'host:port of the first process; SLURM and Cloud TPU slices need no flags.'
)
_PROCESSES = flags.DEFINE_integer('processes', 0, 'How many there are; with --coordinator.')
_PROCESS = flags.DEFINE_integer('process', -1, 'Which this one is, from 0; with --coordinator.')
_JOIN_TIMEOUT = flags.DEFINE_float('join_timeout', 300.0, 'Seconds to wait for the others.')


def default_workdir(config_file: str, seed: int) -> str:
  """runs/<config>-<preset>-seed<seed> for the value of --config."""
  path, _, preset = config_file.partition(':')
  preset = re.sub(r'[^A-Za-z0-9_.]+', '-', preset or 'demo')
  return f'runs/{Path(path).stem}-{preset}-seed{seed}'


def main(_: list[str]) -> None:
  """Reads the settings, finds the devices, runs the stages."""
  from segjax.report.console import log

  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
    # transformers would tell that there is no torch, which segjax does not need.
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  settings, name = settings_from_flags()
  named = _WORKDIR.value or default_workdir(name, settings.seed)
  log(f'segjax {name} -> {named}\nstages {", ".join(settings.stages)}')

  import jax

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  processes.initialize(
    _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN_TIMEOUT.value, has_tpu()
  )

  from segjax.jobs import dry_run, pipeline
  from segjax.model.sharding import make_mesh
  from segjax.run import preemption
  from segjax.run.stage import Command

  mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
  axes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  log(f'devices {len(jax.devices())} x {jax.devices()[0].device_kind}, mesh {axes}')
  workdir, mirrored = _workdir(named, settings)
  line = shlex.join(['python', '-m', 'segjax.main', *sys.argv[1:]])
  stages = pipeline.prepare(settings, workdir, mesh, mirrored, Command(name, line))
  if _DRY_RUN.value:
    dry_run.run(settings, stages)
    return
  pipeline.check_complete(stages)
  workdir.mkdir(parents=True, exist_ok=True)
  if '://' not in named:
    processes.check_shared_filesystem(workdir)
  preemption.interrupt_on_sigterm()
  with mirrored.held(workdir):
    if processes.is_first():
      (workdir / 'config.json').write_text(_CONFIG.value.to_json_best_effort(indent=2) + '\n')
    try:
      pipeline.run(stages, workdir, _STARTED, name)
    except preemption.PreemptedError:
      mirrored.offer()  # the report, which says that it stopped
      raise
    mirrored.publish()
    processes.barrier('end')


def _workdir(named: str, settings: Settings) -> tuple[Path, Any]:
  """(The directory to work in, what keeps a bucket equal to it) for the value of --workdir."""
  from segjax.report.console import log
  from segjax.run import bucket_mirror

  if '://' not in named:
    return Path(named), bucket_mirror.NoMirror()
  local = bucket_mirror.local_directory(named, _MIRROR.value, processes.process_index())
  return local, bucket_mirror.BucketMirror(named, local, settings.checkpoint.max_failures, log)


def has_tpu(devices: Path = Path('/dev')) -> bool:
  """Whether the machine has a TPU: accel0 ... up to v4, vfio/0 ... from v5e on."""
  return any(devices.glob('accel*')) or any(devices.glob('vfio/[0-9]*'))


def hide_unused_libtpu(devices: Path = Path('/dev')) -> None:
  """Keeps jax from loading a libtpu that was installed for `tools/plan.py` alone.

  On a machine without a TPU it would print warnings and look for a metadata server. To be called
  before jax is imported; a name that is None in sys.modules cannot be imported. Where JAX_PLATFORMS
  is set, it is the user's choice and nothing is done.
  """
  if not has_tpu(devices) and not os.environ.get('JAX_PLATFORMS'):
    sys.modules['libtpu'] = None


def settings_from_flags() -> tuple[Settings, str]:
  """The settings that --config and its overrides make, and the value of --config."""
  from segjax.config import validate

  if _CONFIG.value is None:
    raise UserError('--config is missing; start with --config=configs/ppo.py')
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  if _PROFILE.value:
    _CONFIG.value.profile_steps = _PROFILE.value
  return validate.from_config(_CONFIG.value), name


def parse_flags(arguments: list[str]) -> list[str]:
  """Flags from the command line; ValueError, in one line, where they are wrong."""
  from segjax.config import validate

  text = '\n'.join(arguments)
  for config in re.findall(r'^--?config[=\n](.*)$', text, re.MULTILINE):
    file = config.partition(':')[0]
    if not Path(file).is_file():
      raise UserError(f'--config={config}: there is no file {file!r}.')
  for key in re.findall(r'^--?(?:no)?config\.([\w.]+)', text, re.MULTILINE):
    validate.check_key(key)
  try:
    return flags.FLAGS(arguments)
  except flags.Error as error:
    raise UserError(root_cause(error)) from error


def root_cause(error: BaseException) -> str:
  """The message in one line; that of the first cause where it is the text of a traceback."""
  while '\n' in str(error).strip() and error.__context__:
    error = error.__context__
  return str(error)


def cli() -> None:
  """The console script."""
  if sys.argv[1:2] == ['convert']:
    from segjax.hf import cli

    raise SystemExit(cli.main(sys.argv[2:]))
  hide_unused_libtpu()
  run(main)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs `main` on the flags; wrong settings and inputs end in one line, not in a traceback."""
  sys.path.insert(0, os.getcwd())  # config files import their neighbours in configs/
  try:
    app.run(main, flags_parser=parse_flags)
  except KeyboardInterrupt:
    raise SystemExit('segjax: interrupted; the same command goes on from what is saved') from None
  except Exception as error:
    _exit_if_preempted(error)
    if processes.process_count() > 1 and not is_user_error(error):
      processes.fail(error)
    if os.environ.get('SEGJAX_TRACEBACK') or not is_user_error(error):
      raise
    raise SystemExit(f'segjax: {error}') from None


def _exit_if_preempted(error: Exception) -> None:
  """Ends with the code that says: start me again."""
  from segjax.run import preemption

  if isinstance(error, preemption.PreemptedError):
    print(f'segjax: {error}', file=sys.stderr)
    raise SystemExit(preemption.EXIT_CODE) from None


def is_user_error(error: Exception) -> bool:
  """Whether the error is the user's to mend; any other is a defect of segjax and keeps its
  traceback.
  """
  return isinstance(error, UserError | OSError)


if __name__ == '__main__':
  cli()
