"""A table of Arrow batches, in memory or mapped from a temporary file if it is large."""

import tempfile
from typing import Any

from segjax.storage import writing

_IN_MEMORY = 64 << 20  # bytes of a table that is kept in memory


class TableStore:
  """Collects the batches of a table."""

  def __init__(self):
    self._batches: list[Any] = []
    self._num_bytes = 0
    self._file: Any = None
    self._writer: Any = None

  def append(self, batch: Any) -> None:
    """Appends a batch."""
    import pyarrow

    self._batches.append(batch)
    self._num_bytes += batch.nbytes
    if self._num_bytes <= _IN_MEMORY:
      return
    with writing(tempfile.gettempdir()):
      if self._writer is None:
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._writer = pyarrow.ipc.new_stream(self._file, batch.schema)
      for each in self._batches:
        self._writer.write_batch(each)
    self._batches.clear()

  def finish(self, schema: Any) -> Any:
    """Returns the table, of batches of this schema."""
    import pyarrow

    if self._writer is None:
      table = pyarrow.Table.from_batches(self._batches, schema)
    else:
      with writing(tempfile.gettempdir()):
        self._writer.close()
        self._file.flush()
      # The mapping keeps the file, whose name goes with this store.
      table = pyarrow.ipc.open_stream(pyarrow.memory_map(self._file.name)).read_all()
    # Without metadata: features that `datasets` has stored may need a decoder.
    return table.cast(schema.remove_metadata())
