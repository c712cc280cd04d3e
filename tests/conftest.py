"""Sets up every test: eight CPU devices, checked shapes, strict broadcasting, quick compiles."""

import contextlib
import os
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parent.parent

# All of these must be set before jax is first imported; child processes inherit them.
_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'.strip()
os.environ['JAX_PLATFORMS'] = 'cpu'
# Compiled programs are kept between runs, and shared by the processes of one run.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_REPOSITORY / '.cache' / 'xla-tests'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from fixtures import compiles  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compile time is most of the tests' time: LLVM's optimizations cost more than they save.
jax.config.update('jax_disable_most_optimizations', True)
jaxtyping.install_import_hook('segjax', 'beartype.beartype')

# No deadline: the first example compiles. --hypothesis-profile=thorough runs more examples.
hypothesis.settings.register_profile('quick', max_examples=25, deadline=None)
hypothesis.settings.register_profile('thorough', max_examples=100, deadline=None)
hypothesis.settings.load_profile('quick')

pytest_plugins = ['fixtures.stages']


@pytest.fixture(autouse=True, scope='module')
def few_mappings():
  """Frees compiled programs before they take all mappings of memory that Linux gives a process.

  Each takes some, and past the limit (65,530 by default) the compiler crashes.
  """
  yield
  maps = Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 30_000:
    jax.clear_caches()


@pytest.fixture(autouse=True)
def compile_again(request):
  """Turns off the cache on disk for tests marked `compiled`: it keeps no compiler warnings."""
  with contextlib.ExitStack() as stack:
    if request.node.get_closest_marker('compiled'):
      stack.enter_context(compiles.without_cache())
    yield


@pytest.fixture(scope='session')
def shared_files() -> Path:
  """The directory of golden cases, models and data; skips the test if it does not exist."""
  path = (_REPOSITORY / os.environ.get('SEGJAX_SHARED', '../shared')).resolve()
  if not path.is_dir():
    pytest.skip(f'no golden cases at {path}; point SEGJAX_SHARED at them')
  return path
