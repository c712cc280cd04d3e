"""Ways to spoil the directory of a training checkpoint, as disks, people and killed machines do."""

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], object]  # takes the directory of a step


def _arrays(step: Path) -> list[Path]:
  """The files that hold numbers, the largest first."""
  files = [path for path in step.rglob('d/*') if path.is_file()]
  return sorted(files, key=lambda path: -path.stat().st_size)


def _truncate(path: Path, share: float) -> None:
  with path.open('r+b') as file:
    file.truncate(int(path.stat().st_size * share))


def _change(path: Path, new: Callable[[bytes], bytes], size: int = 1) -> None:
  """Replaces `size` bytes in the middle of a file."""
  data = path.read_bytes()
  at = len(data) // 2
  path.write_bytes(data[:at] + new(data[at : at + size]) + data[at + size :])


def _flip(path: Path) -> None:
  _change(path, lambda byte: bytes([byte[0] ^ 1]))


def _zero(path: Path) -> None:
  _change(path, lambda old: bytes(len(old)), 512)


def _each(pattern: str, spoil: Damage) -> Damage:
  """Spoils all files that match; there is at least one."""

  def go(step: Path) -> None:
    paths = [path for path in step.rglob(pattern) if path.is_file()]
    assert paths, pattern
    for path in paths:
      spoil(path)

  return go


def _before(step: Path) -> Path:
  """The step before."""
  return max((p for p in step.parent.iterdir() if p.name.isdecimal() and p != step), key=_number)


def _number(path: Path) -> int:
  return int(path.name)


def _as_before(item: str) -> Damage:
  """An item of the step before in place of this one's."""

  def go(step: Path) -> None:
    shutil.rmtree(step / item)
    shutil.copytree(_before(step) / item, step / item)

  return go


def _remove(name: str) -> Damage:
  return lambda step: shutil.rmtree(step / name)


def _empty(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def _leftover(step: Path) -> None:
  """A save that was killed: all of it is there but its name."""
  shutil.copytree(step, step.with_name(f'{int(step.name) + 1}.orbax-checkpoint-tmp'))


# Each spoils the newest step of a run that has saved `policy`, its optimizer and a manifest.
DAMAGES: dict[str, Damage] = {
  'parameters gone': _remove('policy'),
  'optimizer gone': _remove('policy_optimizer'),
  'manifest gone': _remove('manifest'),
  'largest file at half its size': lambda step: _truncate(_arrays(step)[0], 0.5),
  'largest file empty': lambda step: _truncate(_arrays(step)[0], 0),
  'last byte of the largest file gone': lambda step: _truncate(_arrays(step)[0], 0.999),
  'all files of numbers empty': _each('d/*', lambda path: _truncate(path, 0)),
  'a bit of the largest file': lambda step: _flip(_arrays(step)[0]),
  'a bit of every file of numbers': _each('d/*', _flip),
  '512 zeros in the largest file': lambda step: _zero(_arrays(step)[0]),
  'largest file gone': lambda step: _arrays(step)[0].unlink(),
  'files of numbers gone': _each('d/*', Path.unlink),
  '_METADATA gone': _each('_METADATA', Path.unlink),
  '_METADATA of nonsense': _each('_METADATA', lambda path: path.write_text('{')),
  'manifest.ocdbt gone': _each('manifest.ocdbt', Path.unlink),
  'manifest.ocdbt at half its size': _each('manifest.ocdbt', lambda path: _truncate(path, 0.5)),
  'manifest of nonsense': lambda step: (step / 'manifest' / 'metadata').write_text('{"step":'),
  'manifest empty': lambda step: (step / 'manifest' / 'metadata').write_text(''),
  'parameters of the step before': _as_before('policy'),
  'optimizer of the step before': _as_before('policy_optimizer'),
  'empty directory': _empty,
  'leftover of a killed save': _leftover,
}
