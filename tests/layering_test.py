"""Reads the imports of segjax: a module imports from the wings above its own, never in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'segjax'
# From the top down.
WINGS = (
  *(
    'errors',
    'heap',
    'lost_peers',
    'types',
    'processes',
    'json_files',
    'verifiers',
    'storage',
    'rl',
    'config',
    'model',
    'data',
    'hf',
    'train',
  ),
  *('evaluation', 'report', 'run', 'plan', 'jobs', 'api', 'main'),
)
MODULES = {
  '.'.join(('segjax', *path.relative_to(PACKAGE).with_suffix('').parts)): path
  for path in sorted(PACKAGE.rglob('*.py'))
  if path.name != '__init__.py'
}


def wing(module):
  return module.split('.')[1]


def imports(module):
  """Returns full names of the modules that a module imports, also inside its functions."""
  tree = ast.parse(MODULES[module].read_text(encoding='utf-8'))
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{module} imports by a relative name'
      for alias in node.names:
        full_name = f'{node.module}.{alias.name}'
        names.add(full_name if full_name in MODULES else node.module)
  return names


def test_modules_are_collected():
  assert len(MODULES) > 30
  assert {wing(module) for module in MODULES} <= set(WINGS)
  assert 'segjax.model.sharding' in imports('segjax.model.llama')


@pytest.mark.parametrize('module', MODULES)
def test_imports_come_from_above(module):
  own = WINGS.index(wing(module))
  for name in imports(module):
    if name.split('.')[0] == 'segjax' and name != 'segjax':
      assert name in MODULES, f'{module} imports {name}, which is not a module'
      assert WINGS.index(wing(name)) <= own, f'{module} imports {name} from a wing below'


def test_no_circles():
  done, path = set(), []

  def visit(module):
    assert module not in path, ' -> '.join([*path[path.index(module) :], module])
    if module in done:
      return
    path.append(module)
    for name in imports(module) & set(MODULES):
      visit(name)
    path.pop()
    done.add(module)

  for module in MODULES:
    visit(module)


@pytest.mark.parametrize('module', MODULES)
def test_rooms_are_small(module):
  """300 lines a module, 60 a function, 7 parameters; more only with the reason in the docstring."""
  text = MODULES[module].read_text(encoding='utf-8')
  assert len(text.splitlines()) <= 300
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 60, node.name
      names = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs)]
      if len([name for name in names if name not in ('self', 'cls')]) > 7:
        assert 'parameters' in (ast.get_docstring(node) or ''), node.name


@pytest.mark.parametrize('module', [m for m in MODULES if wing(m) in ('types', 'rl')])
def test_mathematics_needs_jax_alone(module):
  allowed = {'jax', 'jaxtyping', *sys.stdlib_module_names}
  for name in imports(module):
    assert name.split('.')[0] in allowed or wing(name + '.') in ('types', 'rl'), name


def test_durations_come_from_a_monotonic_clock():
  """The time of day may be set while a run lasts; it is for stamps that people read."""
  stamps = {'segjax.processes', 'segjax.run.bucket_lock'}
  for module, path in MODULES.items():
    assert module in stamps or 'time.time()' not in path.read_text(encoding='utf-8'), module


def test_only_the_network_imports_flax():
  users = {m for m in MODULES if any(name.split('.')[0] == 'flax' for name in imports(m))}
  assert users
  assert {wing(module) for module in users} == {'model'}


def test_only_mesh_and_sharding_name_mesh_axes():
  """Elsewhere layouts have names: 'hidden', 'tokens'. Settings name the axes as sizes."""
  for module, path in MODULES.items():
    if module in ('segjax.model.mesh', 'segjax.model.sharding'):
      continue
    tree = ast.parse(path.read_text(encoding='utf-8'))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert 'fsdp' not in strings, module
    assert not any('PartitionSpec' in name for name in names_imported(tree)), module


def names_imported(tree):
  return [alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names]


def test_heavy_packages_are_imported_where_they_are_used():
  """The first line of output comes early: jax and flax are enough to start."""
  heavy = ('transformers', 'datasets', 'orbax', 'torch', 'tensorboardX', 'matplotlib', 'jinja2')
  script = (
    'import sys, segjax.main, segjax.jobs.pipeline, segjax.jobs.dry_run\n'
    f'print(*[name for name in {heavy} if name in sys.modules])'
  )
  command = [sys.executable, '-c', script]
  process = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
  assert process.stdout.split() == []


def test_settings_need_no_jax_backend():
  """Reading a config must not claim the devices, nor import the network."""
  script = (
    'import sys, segjax.config.settings, segjax.main\n'
    'from jax._src import xla_bridge\n'
    'print(bool(xla_bridge._backends), "flax" in sys.modules)'
  )
  command = [sys.executable, '-c', script]
  process = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
  assert process.stdout.split() == ['False', 'False']
