"""Finds config files: those of the user, and the shipped `configs/` from any directory.

A checkout has `configs/` next to `segjax/`; a wheel has a copy of it in `segjax/_shipped/`.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from segjax.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


class ConfigFile(NamedTuple):
  """A shipped config file.

  Attributes:
    name: of the file without .py, which is the name of its job.
    path: of the file.
    docstring: of the file; its first line describes the job.
  """

  name: str
  path: Path
  docstring: str


def shipped_root() -> Path:
  """Returns the directory that holds the shipped `configs/`; config files import from it."""
  shipped = _PACKAGE / '_shipped'
  return shipped if shipped.is_dir() else _PACKAGE.parent


def shipped_configs() -> list[ConfigFile]:
  """Returns the shipped config files, by name."""
  configs = []
  for path in sorted((shipped_root() / 'configs').glob('*.py')):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    configs.append(ConfigFile(path.stem, path, docstring))
  return configs


def resolve(value: str) -> str:
  """Returns the value of --config with a path that exists.

  A file that is not in the working directory is looked up among the shipped ones, so that
  configs/ppo.py works from any directory.

  Raises:
    UserError: there is no such file, it has no get_config, or get_config takes no preset.
  """
  file, colon, preset = value.partition(':')
  path = Path(file)
  if not _is_file(path):
    path = shipped_root() / file
  if not file or not _is_file(path):
    names = ', '.join(f'configs/{config.name}.py' for config in shipped_configs())
    raise UserError(f'--config={value}: there is no file {file!r}; use a file of yours or {names}.')
  takes_preset = _takes_preset(path, value)
  if colon and not takes_preset:
    raise UserError(f'--config={value}: this config has no presets; use --config={file}')
  return f'{path}{colon}{preset}'


def _is_file(path: Path) -> bool:
  try:
    return path.is_file()
  except OSError:  # the name is too long
    return False


def default_preset(file: str) -> str:
  """Returns the preset of a config file if none is given; '' if its source does not show one."""
  path = Path(file) if Path(file).is_file() else shipped_root() / file
  if not path.is_file():
    return ''
  for node in ast.parse(path.read_text(encoding='utf-8')).body:
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config':
      defaults = [value.value for value in node.args.defaults if isinstance(value, ast.Constant)]
      return defaults[0] if defaults and isinstance(defaults[0], str) else ''
  return ''


def short_name(value: str) -> str:
  """Returns the value of --config with the path of a shipped file relative to its root."""
  return value.removeprefix(f'{shipped_root()}/')


def _takes_preset(path: Path, value: str) -> bool:
  """Whether get_config takes an argument; read from the source, so that nothing is run twice."""
  try:
    tree = ast.parse(path.read_text(encoding='utf-8'))
  except (SyntaxError, UnicodeDecodeError) as error:
    raise UserError(f'--config={value} is not a Python file: {error}.') from error
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == 'get_config':
      return bool(node.args.args or node.args.posonlyargs or node.args.vararg)
    if isinstance(node, ast.ImportFrom | ast.Import | ast.Assign) and 'get_config' in _names(node):
      return True  # its arguments are known only after the import
  raise UserError(
    f'--config={value} has no get_config(), so it is not a config; start with configs/ppo.py.'
  )


def _names(node: ast.ImportFrom | ast.Import | ast.Assign) -> set[str]:
  if isinstance(node, ast.Assign):
    return {target.id for target in node.targets if isinstance(target, ast.Name)}
  return {alias.asname or alias.name for alias in node.names}
