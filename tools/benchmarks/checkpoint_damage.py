"""Damages to the directory of a training checkpoint, as disks, people and killed machines do."""

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]  # called with the directory of a step


def _arrays(step: Path) -> list[Path]:
  """Returns the files that hold arrays, the largest first."""
  files = [path for path in step.rglob('d/*') if path.is_file()]
  return sorted(files, key=lambda path: -path.stat().st_size)


def _truncate(path: Path, fraction: float) -> None:
  with path.open('r+b') as file:
    file.truncate(int(path.stat().st_size * fraction))


def _change(path: Path, function: Callable[[bytes], bytes], size: int = 1) -> None:
  """Replaces `size` bytes in the middle of a file."""
  data = path.read_bytes()
  middle = len(data) // 2
  end = middle + size
  path.write_bytes(data[:middle] + function(data[middle:end]) + data[end:])


def _flip(path: Path) -> None:
  _change(path, lambda byte: bytes([byte[0] ^ 1]))


def _zero(path: Path) -> None:
  _change(path, lambda data: bytes(len(data)), 512)


def _each(pattern: str, damage_file: Damage) -> Damage:
  """Damages all files that match; there is at least one."""

  def damage(step: Path) -> None:
    paths = [path for path in step.rglob(pattern) if path.is_file()]
    assert paths, pattern
    for path in paths:
      damage_file(path)

  return damage


def _previous(step: Path) -> Path:
  """Returns the directory of the step before."""
  steps = [path for path in step.parent.iterdir() if path.name.isdecimal() and path != step]
  return max(steps, key=lambda path: int(path.name))


def _replace_by_previous(item: str) -> Damage:
  """Replaces an item by that of the step before."""

  def damage(step: Path) -> None:
    shutil.rmtree(step / item)
    shutil.copytree(_previous(step) / item, step / item)

  return damage


def _remove(name: str) -> Damage:
  return lambda step: shutil.rmtree(step / name)


def _empty(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def _leftover(step: Path) -> None:
  """Adds a save that was killed when all its files were written, before its final rename."""
  shutil.copytree(step, step.with_name(f'{int(step.name) + 1}.orbax-checkpoint-tmp'))


# Each damages the newest step of a run that has saved `policy`, its optimizer and a manifest.
DAMAGES: dict[str, Damage] = {
  'parameters missing': _remove('policy'),
  'optimizer missing': _remove('policy_optimizer'),
  'manifest missing': _remove('manifest'),
  'largest file at half its size': lambda step: _truncate(_arrays(step)[0], 0.5),
  'largest file empty': lambda step: _truncate(_arrays(step)[0], 0),
  'largest file without its end': lambda step: _truncate(_arrays(step)[0], 0.999),
  'all array files empty': _each('d/*', lambda path: _truncate(path, 0)),
  'one bit of the largest file': lambda step: _flip(_arrays(step)[0]),
  'one bit of every array file': _each('d/*', _flip),
  '512 zeros in the largest file': lambda step: _zero(_arrays(step)[0]),
  'largest file missing': lambda step: _arrays(step)[0].unlink(),
  'array files missing': _each('d/*', Path.unlink),
  '_METADATA missing': _each('_METADATA', Path.unlink),
  '_METADATA invalid': _each('_METADATA', lambda path: path.write_text('{')),
  'manifest.ocdbt missing': _each('manifest.ocdbt', Path.unlink),
  'manifest.ocdbt at half its size': _each('manifest.ocdbt', lambda path: _truncate(path, 0.5)),
  'manifest invalid': lambda step: (step / 'manifest' / 'metadata').write_text('{"step":'),
  'manifest empty': lambda step: (step / 'manifest' / 'metadata').write_text(''),
  'parameters of the step before': _replace_by_previous('policy'),
  'optimizer of the step before': _replace_by_previous('policy_optimizer'),
  'empty directory': _empty,
  'leftover of a killed save': _leftover,
}
