"""A stage of a run, as every job receives it."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.model import row_placement, sharding
from segjax.report import console
from segjax.run.bucket_mirror import NoMirror


@dataclasses.dataclass(frozen=True)
class Command:
  """How a user started a run: the config with its preset, the command line, all settings."""

  config: str = ''
  line: str = ''
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One job of a run: its settings, the directory it writes to, the devices.

  Attributes:
    mirror: copies the directory to a bucket, if the working directory is one.
    refresh: called after every step, to update report.html.
    seconds_after: (seconds of this stage in total) -> about those of the stages after it; None if
      unknown.
    command: how the run was started.
    last_step: steps after which training ends without a result; 0 for all.
    write_log: receives a line and the stage's name; None prints them on the console.
  """

  name: str
  settings: Settings
  directory: Path
  mesh: Mesh
  mirror: NoMirror = dataclasses.field(default_factory=NoMirror)
  refresh: Callable[[], None] = lambda: None
  seconds_after: Callable[[float], float | None] = lambda _: None
  command: Command = dataclasses.field(default_factory=Command)
  last_step: int = 0
  write_log: Callable[[str, str], None] | None = None

  @property
  def model_directory(self) -> Path:
    """The directory of the stage's finished model, in HF form."""
    return self.directory / 'model'

  def key(self, purpose: str) -> jax.Array:
    """Returns a random key for `purpose`, from the run's seed and the stage's name."""
    # crc32, not hash(): the key is the same in every process and on every machine.
    number = zlib.crc32(f'{self.name}/{purpose}'.encode()) & 0x7FFFFFFF
    return _key(self.settings.seed, number, self.mesh)

  def to_device(self, x: Any) -> jax.Array:
    """Places a batch of the host on the mesh."""
    return sharding.place_batch(x, self.mesh)

  def gather(self, dataset: Any, rows: np.ndarray) -> Any:
    """Places the batch of these rows on the mesh; each process reads the rows of its devices."""
    return row_placement.place_rows(dataset.gather, rows, self.mesh)

  def log(self, text: str) -> None:
    """Prints a line with the stage's name on the console."""
    (self.write_log or console.log)(text, self.name)


@functools.lru_cache
def _key(seed: int, number: int, mesh: Mesh) -> jax.Array:
  """Returns a random key, which is put on the devices of a mesh once."""
  return jax.random.fold_in(jax.random.key(seed), number)
