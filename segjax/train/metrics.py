"""Metrics of an update, grouped by how those of several updates are combined."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
  """Scalars by name.

  Over several updates `mean` is averaged, `max` takes the largest and `sum` is added up. Over the
  pieces of one batch `mean` is added up too, for the objectives divide by counts of the whole
  batch.
  """

  mean: dict[str, Any] = dataclasses.field(default_factory=dict)
  max: dict[str, Any] = dataclasses.field(default_factory=dict)
  sum: dict[str, Any] = dataclasses.field(default_factory=dict)

  def flat(self) -> dict[str, Any]:
    """Returns all scalars in one dict."""
    return self.mean | self.max | self.sum

  def merge(self, other: 'Metrics') -> 'Metrics':
    """Returns the metrics of both."""
    return Metrics(self.mean | other.mean, self.max | other.max, self.sum | other.sum)

  def prefix(self, prefix: str) -> 'Metrics':
    """Returns the metrics under the names 'prefix/name'."""

    def add_prefix(values):
      return {f'{prefix}/{name}': value for name, value in values.items()}

    return Metrics(add_prefix(self.mean), add_prefix(self.max), add_prefix(self.sum))


@jax.jit
def combine_updates(updates: list[Metrics]) -> dict[str, jax.Array]:
  """Returns the metrics of several updates as one dict; means are in float32."""

  def mean(*values):
    return jnp.mean(jnp.stack(values).astype(jnp.float32))

  def reduce(function, parts):
    return jax.tree.map(lambda *values: function(jnp.stack(values)), *parts)

  return Metrics(
    mean=jax.tree.map(mean, *(update.mean for update in updates)),
    max=reduce(jnp.max, [update.max for update in updates]),
    sum=reduce(jnp.sum, [update.sum for update in updates]),
  ).flat()
