"""segjax: segment-level RLHF for Llama-3 in JAX and Flax.

  from segjax import rl                       the method, one pure function per equation
  segjax.load_policy(path)                    sample, log-probs, segments: see `segjax.api`
  segjax.load_reward_model(path, reference)   scores of segments
  segjax.train(config, workdir)               any job: see `segjax.jobs.launch`
  segjax.show_segments(responses)             coloured in a notebook

Importing segjax imports nothing else; each of these is imported on first use.
"""

from typing import Any

__all__ = ['load_policy', 'load_reward_model', 'rl', 'show_segments', 'train']

_MODULES = {
  'load_policy': 'segjax.api',
  'load_reward_model': 'segjax.api',
  'show_segments': 'segjax.report.inline_segments',
}


def __getattr__(name: str) -> Any:
  import importlib

  if name in _MODULES:
    return getattr(importlib.import_module(_MODULES[name]), name)
  if name in ('rl', 'train'):
    return importlib.import_module(f'segjax.{name}')
  if name == '__version__':
    return _version()
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*globals(), *__all__, '__version__']


def _version() -> str:
  from importlib import metadata

  try:
    return metadata.version('segjax')
  except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    return 'unknown'
