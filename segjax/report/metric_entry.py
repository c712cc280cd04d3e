"""The description of a metric, of which `metric_docs` and `training_metric_docs` hold many."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
  """A metric, or several that are read together.

  Attributes:
    names: names or patterns; * in a pattern stands for any text.
    description: what the metrics are; with several names, in their order.
    healthy: values of a run without problems.
    remedy: what to do about other values.
  """

  names: tuple[str, ...]
  description: str
  healthy: str = ''
  remedy: str = ''
