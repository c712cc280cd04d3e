"""Hashes the code that results depend on: segjax with its libraries, and functions of the user."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import modulefinder
import operator
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import segjax

# The wings of segjax that only show results, or plan a run, are left out.
_RESULT_WINGS = ('config', 'data', 'evaluation', 'hf', 'jobs', 'model', 'rl', 'run', 'train')
_LIBRARIES = (
  *('jax', 'jaxlib', 'flax', 'optax', 'numpy'),
  *('transformers', 'tokenizers', 'jinja2', 'safetensors', 'orbax-checkpoint'),
)


@functools.cache
def versions() -> dict[str, str]:
  """Returns the versions of segjax and of the libraries that results depend on.

  segjax has a hash of its source too: a checkout changes while its version stays.
  """
  result = {'segjax': segjax.__version__, 'segjax source': _hash_segjax()}
  for name in _LIBRARIES:
    try:
      result[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      result[name] = ''
  return result


def _hash_segjax() -> str:
  package = Path(segjax.__file__).parent
  files = [file for wing in _RESULT_WINGS for file in (package / wing).rglob('*.py')]
  return _hash_files([*files, *package.glob('*.py')], package)


def hash_function(path: str) -> str:
  """Returns a hash of the source of 'module:function'.

  That is its module's file and the files that it imports, directly or not, from the directory of
  its top-level package or module. Of an installed package it is the module's file alone. '' if the
  module has no source, or belongs to segjax, which `versions` covers.
  """
  name, _, function = path.partition(':')
  if name == '__main__':
    return _hash_main(function)
  package, *inner = name.split('.')
  spec = importlib.util.find_spec(name)
  if package == 'segjax' or spec is None or not spec.origin or not Path(spec.origin).is_file():
    return ''
  origin = Path(spec.origin).resolve()
  # The directory that is on sys.path: above the file by the parts of the module's name.
  depth = len(inner) + (origin.name == '__init__.py')
  root = origin.parents[depth]
  if root in _installed_directories():
    return _hash_files([origin], root)
  return _hash_files([origin, *_imported_files(name, origin, root)], root)


def _hash_main(function: str) -> str:
  """Returns a hash of the source of a function of a script or notebook, which has no spec."""
  try:
    source = inspect.getsource(operator.attrgetter(function)(sys.modules['__main__']))
  except (OSError, TypeError, AttributeError):  # defined where no source is kept
    return ''
  return hashlib.sha256(source.encode()).hexdigest()


def _imported_files(name: str, origin: Path, root: Path) -> set[Path]:
  """Returns the files below `root` that a module imports; runs none of them."""
  finder = modulefinder.ModuleFinder(path=[str(root)], excludes=['segjax'])
  try:
    finder.import_hook(name)
  except Exception:  # a package without __init__.py, a file that is not Python
    return {file.resolve() for file in origin.parent.glob('*.py')}
  loaded = (module.__file__ for module in finder.modules.values())
  files = {Path(file).resolve() for file in loaded if file}
  return {file for file in files if file.is_relative_to(root)}


def _installed_directories() -> set[Path]:
  names = ('purelib', 'platlib', 'stdlib', 'platstdlib')
  return {Path(sysconfig.get_path(name)).resolve() for name in names}


def _hash_files(files: Iterable[Path], root: Path) -> str:
  """Returns the SHA-256 of the files' names, relative to the root, and of their bytes."""
  digest = hashlib.sha256()
  for file in sorted(set(files)):
    content = file.read_bytes()
    digest.update(f'{file.relative_to(root)}\0{len(content)}\0'.encode())
    digest.update(content)
  return digest.hexdigest()
