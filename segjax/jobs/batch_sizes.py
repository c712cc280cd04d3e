"""Sizes of a job's batches: whether they fit the mesh, and which to lower if memory runs out."""

from operator import attrgetter

from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.jobs.job import Job
from segjax.model.mesh import check_batch
from segjax.run.training_loop import check_micro_batch


def check_batches(job: Job, settings: Settings, mesh: Mesh) -> None:
  """Checks that the batches of the job divide over the mesh; UserError names the key."""
  for key in job.batch_keys:
    if size := attrgetter(key)(settings):
      check_batch(f'config.{key}={size}', size, mesh)
  check_micro_batch(settings, job.name, mesh)


def keys_to_lower(job: Job, settings: Settings) -> str:
  """Returns the keys of the job's batch sizes, for a message."""
  keys = ', '.join(f'config.{key}' for key in job.batch_keys)
  counts_tokens = getattr(getattr(settings, job.name, None), 'micro_batch_tokens', 0)
  return keys.replace('micro_batch_size', 'micro_batch_tokens') if counts_tokens else keys
