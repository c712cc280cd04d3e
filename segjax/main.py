"""The command line: flags, devices, one call. The work is in `segjax.jobs`.

python -m segjax.main --config=configs/ppo.py[:preset] [--workdir=...] [--config.KEY=VALUE ...]
"""

import time

_STARTED = time.time()

import os  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file of configs/, with its preset: configs/ppo.py:local.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run writes; default runs/<config>-<preset>-seed<seed>.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Resolve, check and print the config with its counts; load no weights.'
)
_CACHE = flags.DEFINE_string(
  'compilation_cache',
  os.environ.get('JAX_COMPILATION_CACHE_DIR', str(Path.home() / '.cache' / 'segjax')),
  'Where compiled programs are kept between runs; empty for nowhere.',
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Join the other hosts of a slice or cluster (jax.distributed).'
)


def default_workdir(config_file: str, seed: int) -> str:
  """runs/<config>-<preset>-seed<seed> for the value of --config."""
  path, _, preset = config_file.partition(':')
  preset = re.sub(r'[^A-Za-z0-9_.]+', '-', preset or 'demo')
  return f'runs/{Path(path).stem}-{preset}-seed{seed}'


def main(_: list[str]) -> None:
  """Reads the settings, finds the devices, runs the stages."""
  from segjax import settings as typed
  from segjax.report.console import say

  if _CONFIG.value is None:
    raise ValueError('--config is missing; start with --config=configs/ppo.py')
  settings = typed.from_config(_CONFIG.value)
  typed.validate(settings)
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  workdir = Path(_WORKDIR.value or default_workdir(name, settings.seed))
  say(f'segjax: {name} -> {workdir}; stages {", ".join(settings.stages)}')

  import jax

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
  if _DISTRIBUTED.value:
    jax.distributed.initialize()

  from segjax.jobs import dry_run, pipeline
  from segjax.model.sharding import make_mesh

  mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
  say(f'{len(jax.devices())} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}')
  if _DRY_RUN.value:
    dry_run.run(settings, workdir, mesh)
    return
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(_CONFIG.value.to_json_best_effort(indent=2) + '\n')
  pipeline.run(settings, workdir, mesh, _STARTED)


def run() -> None:
  """The console script: wrong settings and inputs end in one line, not in a traceback."""
  sys.path.insert(0, os.getcwd())  # config files import their neighbours in configs/

  def parse(arguments: list[str]) -> list[str]:
    try:
      return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError) as error:
      from segjax.settings import unknown_key

      keys = [re.match(r'--config\.([\w.]+)', argument) for argument in arguments]
      wrong = [key.group(1) for key in keys if key and unknown_key(key.group(1))]
      raise SystemExit(f'segjax: {wrong[0] if wrong else error}') from error

  try:
    app.run(main, flags_parser=parse)
  except (ValueError, FileNotFoundError) as error:
    if os.environ.get('SEGJAX_TRACEBACK'):
      raise
    raise SystemExit(f'segjax: {error}') from error


if __name__ == '__main__':
  run()
