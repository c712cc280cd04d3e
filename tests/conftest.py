"""What every test needs: eight CPU devices, checked shapes, strict broadcasting, quick compiles."""

import os
from pathlib import Path

# Both must be set before jax is first imported.
_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'.strip()
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Compile time is most of the tests' time: LLVM's optimizations cost more than they save.
jax.config.update('jax_disable_most_optimizations', True)
jaxtyping.install_import_hook('segjax', 'beartype.beartype')


@pytest.fixture(autouse=True, scope='module')
def few_mappings():
  """Lets compiled programs go before they take all mappings of memory that Linux gives a process.

  Each takes some, and past the limit (65,530 by default) the compiler crashes.
  """
  yield
  maps = Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 30_000:
    jax.clear_caches()


pytest_plugins = ['fixtures.stages']

_REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def material() -> Path:
  """The folder of golden cases, or a skip where it is not at hand."""
  path = (_REPOSITORY / os.environ.get('SEGJAX_MATERIAL', '../shared')).resolve()
  if not path.is_dir():
    pytest.skip(f'no golden cases at {path}; point SEGJAX_MATERIAL at them')
  return path
