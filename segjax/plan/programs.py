"""The jitted programs of a job, with the shapes and layouts of what they are given.

Nothing is made: parameters, optimizer states and batches are `jax.ShapeDtypeStruct`s. What a job
does with them, and in which order, is the business of `jobs`; a phase calls the same functions.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from segjax.config.settings import Segmentation, Settings
from segjax.data.batches import TokenBatch
from segjax.model import decode, decode_sizes, generate, sharding
from segjax.model.llama import LlamaConfig
from segjax.plan import abstract_arrays
from segjax.run.models import apply_runtime
from segjax.train import rollout as rollouts
from segjax.train.experience import make_experience
from segjax.train.ppo_step import Minibatch, critic_step, policy_step
from segjax.train.recipe import PPORecipe
from segjax.train.reward_scoring import SegmentScorer, evaluate_pairs
from segjax.train.reward_spec import override
from segjax.train.reward_step import reward_step
from segjax.train.scoring import score_chunk
from segjax.train.segmenter import Segmenter
from segjax.train.sft_step import sft_step
from segjax.types import Normalizer

STOP_IDS = (0,)  # how many there are, and which, changes no shape


@dataclasses.dataclass(frozen=True)
class Phase:
  """One program of a job.

  Attributes:
    name: of the phase.
    function: the jitted function.
    arguments: trees of shapes.
    static: its static arguments.
    alive: names in `Program.held` of what lives on the devices meanwhile.
    passed: what of it, or of its parts, is among the arguments.
  """

  name: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  static: dict[str, Any]
  alive: tuple[str, ...]
  passed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class JobPrograms:
  """A job as its phases see it.

  Attributes:
    held: trees of shapes that live across phases, by name; 'X parameters' is a part of 'X state'.
    phases: in the order in which they run.
    networks: the networks by name, as they are run.
  """

  held: dict[str, Any]
  phases: list[Phase]
  networks: dict[str, LlamaConfig]

  def sizes(self) -> dict[str, int]:
    """Bytes of a device by name, parts left out."""
    wholes = {k: tree for k, tree in self.held.items() if not k.endswith(' parameters')}
    return {name: abstract_arrays.bytes_per_device(tree) for name, tree in wholes.items()}


def program(job: str, settings: Settings, network: LlamaConfig, mesh: Mesh) -> JobPrograms:
  """The phases of that job for networks of those sizes."""
  return JOBS[job](settings, network, mesh)


def lowered(phase: Phase, mesh: Mesh) -> Any:
  """The phase, traced and lowered for the platform of the mesh's devices."""
  return abstract_arrays.lower(mesh, phase.function, phase.arguments, phase.static)


def _ppo(s: Settings, network: LlamaConfig, mesh: Mesh) -> JobPrograms:
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  names = (
    'policy',
    'critic',
    'reference',
    *(('reward',) if s.reward_shaping.reward_model_weight else ()),
  )
  networks = {name: trained if name in ('policy', 'critic') else frozen for name in names}
  ppo, prompt, response = s.ppo, s.data.max_prompt_length, s.rollout.max_new_tokens
  segmentation = override(Segmentation(), s.reward_model.segmentation)
  recipe = PPORecipe(
    policy=trained,
    reference=frozen,
    reward=networks.get('reward'),
    critic=trained,
    segmenter=Segmenter(segmentation),
    spread='even_split',
    shaping=s.reward_shaping,
    ppo=ppo,
    compat=s.compat,
    recompute_logprob=s.rollout.recompute_logprob,
  )
  lengths = prompt, response
  rollout = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.rollout(ppo.rollout_batch_size, *lengths), mesh
  )
  experience = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.experience(ppo.rollout_batch_size, *lengths), mesh
  )
  held = {
    'policy state': abstract_arrays.state(trained, 'language', ppo.policy_optimizer, s, mesh),
    'critic state': abstract_arrays.state(trained, 'scalar', ppo.critic_optimizer, s, mesh),
    'reference': abstract_arrays.params(frozen, 'language', s.runtime.compute_dtype, mesh),
    **(
      {'reward model': abstract_arrays.params(frozen, 'scalar', s.runtime.compute_dtype, mesh)}
      if 'reward' in networks
      else {}
    ),
    'rollout': rollout,
    'experience': experience,
  }
  on_host = s.runtime.frozen_params_memory == 'host'
  waiting = tuple(name for name in ('reference', 'reward model') if name in held and not on_host)
  scoring = tuple(name for name in ('reference', 'reward model') if name in held)
  states = ('policy state', 'critic state')
  phases = []

  for phase in _generation(s, trained, held, mesh, prompt):
    phases.append(dataclasses.replace(phase, alive=(*states, *waiting, *phase.alive)))

  size = ppo.scoring_batch_size or ppo.rollout_batch_size
  width = prompt + response
  params = {
    'reference': held['reference'],
    'critic': held['critic state'].params,
    **({'reward': held['reward model']} if 'reward model' in held else {}),
    **({'policy': held['policy state'].params} if s.rollout.recompute_logprob else {}),
  }
  phases.append(
    Phase(
      'scoring',
      score_chunk,
      (
        params,
        abstract_arrays.batch(mesh, jnp.int32, size, width),
        None,
        abstract_arrays.batch_shape_structs(lambda: abstract_arrays.rollout(size, *lengths), mesh),
      ),
      {'recipe': recipe},
      (*states, *scoring, 'rollout', 'experience'),
      (*scoring, 'critic parameters'),
    )
  )
  coef = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
  scored = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.scores(ppo.rollout_batch_size, response), mesh
  )
  normalizer = jax.tree.map(lambda _: coef, Normalizer())
  phases.append(
    Phase(
      'rewards',
      make_experience,
      (rollout, scored, normalizer, coef, None),
      {'recipe': recipe},
      (*states, *waiting, 'rollout'),
      ('rollout',),
    )
  )
  rows = jax.ShapeDtypeStruct((ppo.minibatch_size,), jnp.int32, sharding=sharding.replicated(mesh))
  packing = abstract_arrays.packing(ppo, ppo.minibatch_size, mesh)
  enabled = jax.ShapeDtypeStruct((), jnp.bool, sharding=sharding.replicated(mesh))
  static = {'recipe': recipe, 'total_steps': 100}
  alive = (*states, *waiting, 'experience')
  for name, step, more in (('policy', policy_step, (coef,)), ('critic', critic_step, ())):
    state = f'{name} state'
    arguments = (held[state], Minibatch(experience, rows, packing, enabled), *more)
    phases.append(Phase(f'{name} update', step, arguments, static, alive, (state, 'experience')))
  held['critic parameters'] = held['critic state'].params
  return JobPrograms(held, phases, networks)


def _generation(
  s: Settings, config: LlamaConfig, held: dict[str, Any], mesh: Mesh, prompt: int
) -> Iterator[Phase]:
  """The phases of a rollout; adds what they hold."""
  decoder = generate.make_decode_config(config, rollouts.sampling(s.rollout), STOP_IDS, mesh)
  before, positions = decode_sizes.cache_positions(prompt, decoder)
  slots = s.rollout.max_concurrent or s.ppo.rollout_batch_size
  static = {'decoder': decoder}
  params = held['policy state'].params
  held['decode weights'] = weights = abstract_arrays.output_shape_structs(
    mesh, decode.decode_weights, params, **static
  )
  cache = functools.partial(
    abstract_arrays.output_shape_structs, mesh, decode.empty_slots, **static
  )
  held['cache'] = full = cache(slots, positions)
  held['cache before'] = cache(slots, before) if before else ()
  prompts = s.ppo.rollout_batch_size // s.rollout.samples_per_prompt
  rows, size = decode_sizes.prefill_shape(min(prompts, slots), prompt, decoder, mesh)
  ids = jax.ShapeDtypeStruct((rows, size), jnp.int32, sharding=sharding.replicated(mesh))
  length = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding.replicated(mesh))
  with_cache = ('decode weights', 'cache')
  yield Phase(
    'decode weights', decode.decode_weights, (params,), static, (), ('policy parameters',)
  )
  held['policy parameters'] = params
  prefill = (weights, ids, length)
  yield Phase('prefill', decode.prefill, prefill, static, with_cache, ('decode weights',))
  if before:
    grow = (held['cache before'], None, positions)
    alive = ('decode weights', 'cache before')
    yield Phase('cache growth', decode.resize_slots, grow, static, alive, ('cache before',))
  yield Phase('decode chunk', decode.decode_chunk, (weights, full), static, with_cache, with_cache)


def _reward(s: Settings, network: LlamaConfig, mesh: Mesh) -> JobPrograms:
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  scorer = SegmentScorer(trained, frozen, Segmenter(s.reward.segmentation))
  held = {
    'reward model state': abstract_arrays.state(trained, 'scalar', s.reward.optimizer, s, mesh)
  }
  if scorer.segmenter.needs_entropy and not s.reward.entropy_cache_dir:
    held['reference'] = abstract_arrays.params(frozen, 'language', s.runtime.compute_dtype, mesh)
  held['pairs'] = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.pairs(s.reward.batch_size, s.data.max_length), mesh
  )
  static = {'scorer': scorer, 'settings': s.reward, 'total_steps': 100}
  names = tuple(held)
  state, reference, pairs = held['reward model state'], held.get('reference'), held['pairs']
  packing = abstract_arrays.packing(s.reward, 2 * s.reward.batch_size, mesh, group=2)
  given = state, reference, pairs, packing
  phases = [Phase('reward model update', reward_step, given, static, names, names)]
  held['reward model parameters'] = state.params
  asked, scorer = (state.params, reference, pairs), {'scorer': scorer}
  passed = ('reward model parameters', *names[1:])
  phases.append(Phase('held-out pairs', evaluate_pairs, asked, scorer, names, passed))
  return JobPrograms(held, phases, {'reward': trained, 'reference': frozen})


def _sft(s: Settings, network: LlamaConfig, mesh: Mesh) -> JobPrograms:
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  shape = s.sft.batch_size, s.data.max_length
  held = {
    'policy state': abstract_arrays.state(trained, 'language', s.sft.optimizer, s, mesh),
    'rows': TokenBatch(
      *(abstract_arrays.batch(mesh, kind, *shape) for kind in (jnp.int32, jnp.bool_))
    ),
  }
  static = {'config': trained, 'settings': s.sft, 'total_steps': 100}
  given = *held.values(), abstract_arrays.packing(s.sft, s.sft.batch_size, mesh)
  phase = Phase('policy update', sft_step, given, static, tuple(held), tuple(held))
  return JobPrograms(held, [phase], {'policy': trained})


JOBS = {'sft': _sft, 'reward': _reward, 'ppo': _ppo}
