"""setup.py declares what segjax imports, and nothing else."""

import ast
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Distributions whose name is not that of the module.
DISTRIBUTION = {'absl': 'absl-py', 'jaxlib': 'jax', 'orbax': 'orbax-checkpoint', 'yaml': 'pyyaml'}
NOT_YET_IMPORTED = {'safetensors'}
# Imported only where the user has installed the extra.
EXTRAS = {'torch', 'wandb'}


def imported_modules():
  """Returns {top-level module: a file that imports it} for the package and the configs."""
  modules = {}
  for folder in ('segjax', 'configs'):
    for path in sorted((REPOSITORY / folder).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
          names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
          names = [node.module]
        else:
          continue
        modules |= {name.partition('.')[0]: path for name in names}
  return modules


def keywords_of_setup():
  """Returns the literal arguments of setup() in setup.py."""
  tree = ast.parse((REPOSITORY / 'setup.py').read_text(encoding='utf-8'))
  (call,) = (
    node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == 'setup'
  )
  return {
    keyword.arg: ast.literal_eval(keyword.value)
    for keyword in call.keywords
    if keyword.arg in ('install_requires', 'extras_require', 'entry_points')
  }


def _name(node):
  return node.id if isinstance(node, ast.Name) else ''


def distribution(requirement):
  return re.match(r'[\w-]+', requirement)[0].lower()


def test_every_import_is_declared_and_nothing_else():
  ours = {'segjax', 'configs', *sys.stdlib_module_names}
  modules = {name: path for name, path in imported_modules().items() if name not in ours | EXTRAS}
  imported = {DISTRIBUTION.get(name, name).lower(): path for name, path in modules.items()}
  declared = {distribution(name) for name in keywords_of_setup()['install_requires']}
  undeclared = {name: path for name, path in imported.items() if name not in declared}
  assert not undeclared
  assert declared - set(imported) <= NOT_YET_IMPORTED


def test_modules_of_extras_are_declared():
  extras = keywords_of_setup()['extras_require']
  declared = {distribution(name) for names in extras.values() for name in names}
  assert declared >= EXTRAS


def test_console_script_is_a_function():
  (script,) = keywords_of_setup()['entry_points']['console_scripts']
  module, function = script.partition('=')[2].split(':')
  tree = ast.parse((REPOSITORY / f'{module.replace(".", "/")}.py').read_text(encoding='utf-8'))
  assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_message_installs_from_an_index():
  """The project is on no index: extras are installed from a checkout."""
  for folder in ('segjax', 'configs', 'tools', 'README.md'):
    path = REPOSITORY / folder
    for file in [path] if path.is_file() else path.rglob('*.py'):
      assert 'pip install segjax' not in file.read_text(encoding='utf-8'), file
