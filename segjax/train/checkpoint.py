"""Training states on disk, through Orbax: saved by step, restored onto the mesh at hand.

Finished models are HF directories (`hf.writer`); this is for going on from the middle.
"""

from pathlib import Path
from typing import Any

import jax


class Checkpointer:
  """Keeps the last `keep` steps of named trees of arrays in a directory."""

  def __init__(self, directory: Path, keep: int):
    import orbax.checkpoint as ocp

    self._ocp = ocp
    self._manager = ocp.CheckpointManager(
      directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    )

  def latest(self) -> int | None:
    """The newest step saved, None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, states: dict[str, Any]) -> None:
    """Saves the states after `step` steps; returns once they are copied off the devices."""
    items = {name: self._ocp.args.StandardSave(state) for name, state in states.items()}
    self._manager.save(step, args=self._ocp.args.Composite(**items))

  def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
    """The states of `step`, shaped and placed as those in `like`."""
    items = {
      name: self._ocp.args.StandardRestore(jax.tree.map(_abstract, state))
      for name, state in like.items()
    }
    restored = self._manager.restore(step, args=self._ocp.args.Composite(**items))
    return {name: restored[name] for name in like}

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _abstract(x: jax.Array) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
