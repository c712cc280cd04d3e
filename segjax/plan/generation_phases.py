"""The phases of generation in PPO: programs, sizes of the pools, and how often each is called."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from segjax.config.settings import Settings
from segjax.errors import UserError
from segjax.model import decode_memory
from segjax.model.decode import DecodeConfig
from segjax.model.decode_sizes import PoolSize
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import decode_mesh
from segjax.plan import abstract_arrays
from segjax.plan.decode_programs import DECODE_PHASES, decode_programs
from segjax.plan.lengths import TextLengths
from segjax.plan.phases import Calls, Phase, refused_phase
from segjax.plan.rollout_counts import count_rollout
from segjax.train import rollout as rollouts

STOP_IDS = (0,)  # their number and values change no shape


def generation_phases(
  s: Settings,
  config: LlamaConfig,
  trees: dict[str, Any],
  texts: TextLengths,
  mesh: Mesh,
  free_bytes: float,
) -> tuple[list[Phase], int]:
  """Returns (phases of a rollout, responses at once); adds its weights and pages to `trees`.

  Args:
    texts: lengths of a rollout. As in a run, rows and pages follow from the memory that is left and
      from the prompts' mean length.
    free_bytes: of a device, beside what lives there all the time.
  """
  decoder = rollouts.make_decoder(s.rollout, config, STOP_IDS, mesh)
  decoder = replace(decoder, weights_dtype=s.rollout.weights_dtype)
  mesh = decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads, decoder.tensor)
  size, refused = _pool_size(s, decoder, mesh, texts, free_bytes)
  longest, samples = s.data.max_prompt_length, s.rollout.samples_per_prompt
  try:
    programs = decode_programs(decoder, mesh, trees['sampled parameters'], size, longest)
  except jax.errors.JaxRuntimeError as error:
    # The compiler gives the layout of weights and pages, which the other programs read.
    if not (message := abstract_arrays.refusal(error)):
      raise
    return [refused_phase(name, message) for name in DECODE_PHASES], 0
  trees |= {'decode weights': programs.weights, 'pages': programs.pages}
  if refused:
    phases = [replace(phase, calls=None, refused=refused) for phase in programs.phases]
    return phases, 0

  @functools.cache
  def calls() -> dict[str, Calls]:
    counts = count_rollout(texts, decoder, size, mesh.shape['data'], samples, carry=s.rollout.carry)
    prefill = programs.bytes_read(counts.read, counts.rows)
    steps = programs.bytes_read(counts.live)
    each = (
      Calls(1),
      Calls(counts.prefills, pages=prefill),
      Calls(counts.copies),
      Calls(counts.steps / decoder.chunk, decoder.chunk, pages=steps),
    )
    return dict(zip(DECODE_PHASES, each, strict=True))

  phases = [
    replace(phase, calls=functools.partial(lambda name: calls()[name], phase.name))
    for phase in programs.phases
  ]
  return phases, size.slots


def _pool_size(
  s: Settings, decoder: DecodeConfig, mesh: Mesh, texts: TextLengths, free_bytes: float
) -> tuple[PoolSize, str]:
  """Returns (the rows and pages that a run has, why a run is refused or '')."""
  arguments = {
    'responses': s.ppo.rollout_batch_size,
    'longest': s.data.max_prompt_length,
    'mean_prompt': texts.prompt.mean() / s.rollout.samples_per_prompt,
    'max_concurrent': s.rollout.max_concurrent,
  }
  try:
    return decode_memory.plan_pool(decoder, mesh, free_bytes=free_bytes, **arguments), ''
  except UserError as error:
    # With a row per group the plan says by how much it does not fit.
    arguments['max_concurrent'] = 1
    size = decode_memory.plan_pool(decoder, mesh, free_bytes=math.inf, **arguments)
    return size, str(error)
