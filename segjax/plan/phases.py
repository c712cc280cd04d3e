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

from segjax.data.batches import TokenBatch
from segjax.jobs.stage import as_run
from segjax.model import decode, generation, heads, sharding
from segjax.model.llama import LlamaConfig
from segjax.settings import Optimizer, Segmentation, Settings
from segjax.train import rollout as rollouts
from segjax.train.cutting import Cutter
from segjax.train.experience import Recipe, score_piece
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import critic_step, policy_step
from segjax.train.reward_step import Scorer, reward_step
from segjax.train.segment_reward import overruled
from segjax.train.sft_step import sft_step
from segjax.types import Experience, PreferenceBatch, Rollout, Segments, Sequences

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
class Program:
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
    return {name: bytes_per_device(tree) for name, tree in wholes.items()}


def program(job: str, settings: Settings, network: LlamaConfig, mesh: Mesh) -> Program:
  """The phases of that job for networks of those sizes."""
  return JOBS[job](settings, network, mesh)


def lowered(phase: Phase, mesh: Mesh) -> Any:
  """The phase, traced and lowered for the platform of the mesh's devices."""
  return _lower(mesh, phase.function, phase.arguments, phase.static)


def _lower(mesh: Mesh, function: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> Any:
  with jax.set_mesh(mesh):
    traced = function.trace(*arguments, **static)
    return traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))


def bytes_per_device(tree: Any) -> int:
  """What the arrays of such shapes take on the device that has most of them."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    size = functools.reduce(lambda a, b: a * b, shape, 1)
    total += size * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
  return total


def _placed(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )


def _params(config: LlamaConfig, head: str, dtype: str, mesh: Mesh) -> Any:
  shapes = heads.param_shapes(config, head)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  return _placed(shapes, sharding.tree_shardings(shapes, mesh))


def _state(config: LlamaConfig, head: str, optimizer: Optimizer, settings: Settings, mesh: Mesh):
  params = _params(config, head, settings.runtime.weights_dtype, mesh)
  shapes = jax.eval_shape(lambda params: init_state(params, optimizer, 100), params)
  return _placed(shapes, sharding.tree_shardings(shapes, mesh))


def _batch(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
  """An array split along its first axis."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(len(shape), mesh))


def _split(make: Callable[[], Any], mesh: Mesh) -> Any:
  """The shapes of the arrays that `make` would return, each split along its first axis."""
  return jax.tree.map(lambda x: _batch(mesh, x.dtype, *x.shape), jax.eval_shape(make))


def _result(mesh: Mesh, function: Any, *arguments: Any, **static: Any) -> Any:
  """The shapes that a jitted function returns, laid out as it lays them out."""
  with jax.set_mesh(mesh):
    shapes = function.eval_shape(*arguments, **static)
  compiled = _lower(mesh, function, arguments, static).compile()
  return _placed(shapes, compiled.output_shardings)


def _rollout(size: int, prompt: int, response: int) -> Rollout:
  lengths, tokens = jnp.zeros(size, jnp.int32), jnp.zeros((size, response), jnp.int32)
  return Rollout(
    prompt_ids=jnp.zeros((size, prompt), jnp.int32),
    prompt_length=lengths,
    response_ids=tokens,
    response_mask=tokens > 0,
    finished=lengths > 0,
    old_logprob=tokens.astype(jnp.float32),
    sample_logprob=tokens.astype(jnp.float32),
  )


def _experience(size: int, prompt: int, response: int) -> Experience:
  rollout = _rollout(size, prompt, response)
  mask, tokens = rollout.response_mask, rollout.response_ids
  names = ('ref_logprob', 'entropy', 'score', 'value', 'reward', 'advantage', 'return_')
  return Experience(
    rollout=rollout,
    **dict.fromkeys(names, rollout.old_logprob),
    segments=Segments(mask, mask, tokens, rollout.prompt_length),
    value_mask=mask,
  )


def _pairs(size: int, length: int) -> PreferenceBatch:
  ids = jnp.zeros((size, length), jnp.int32)
  side = Sequences(ids=ids, response_mask=ids > 0, finished=ids[:, 0] > 0)
  return PreferenceBatch(side, side)


def _ppo(s: Settings, network: LlamaConfig, mesh: Mesh) -> Program:
  trained, _ = as_run(network, s.runtime, mesh, trained=True)
  frozen, _ = as_run(network, s.runtime, mesh, trained=False)
  names = ('policy', 'critic', 'reference', *(('reward',) if s.shaping.reward_model_weight else ()))
  networks = {name: trained if name in ('policy', 'critic') else frozen for name in names}
  ppo, prompt, response = s.ppo, s.data.max_prompt_length, s.rollout.max_new_tokens
  segmentation = overruled(Segmentation(), s.reward_model.segmentation)
  recipe = Recipe(
    policy=trained,
    reference=frozen,
    reward=networks.get('reward'),
    critic=trained,
    cutter=Cutter(segmentation),
    spread='even_split',
    shaping=s.shaping,
    ppo=ppo,
    compat=s.compat,
    recompute_logprob=s.rollout.recompute_logprob,
  )
  lengths = prompt, response
  rollout = _split(lambda: _rollout(ppo.rollout_batch, *lengths), mesh)
  experience = _split(lambda: _experience(ppo.rollout_batch, *lengths), mesh)
  held = {
    'policy state': _state(trained, 'language', ppo.policy_optimizer, s, mesh),
    'critic state': _state(trained, 'scalar', ppo.critic_optimizer, s, mesh),
    'reference': _params(frozen, 'language', s.runtime.dtype, mesh),
    **(
      {'reward model': _params(frozen, 'scalar', s.runtime.dtype, mesh)}
      if 'reward' in networks
      else {}
    ),
    'rollout': rollout,
    'experience': experience,
  }
  on_host = s.runtime.frozen_memory == 'host'
  waiting = tuple(name for name in ('reference', 'reward model') if name in held and not on_host)
  scoring = tuple(name for name in ('reference', 'reward model') if name in held)
  states = ('policy state', 'critic state')
  phases = []

  for phase in _generation(s, trained, held, mesh, prompt):
    phases.append(dataclasses.replace(phase, alive=(*states, *waiting, *phase.alive)))

  size = ppo.score_batch or ppo.rollout_batch
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
      score_piece,
      (
        params,
        _batch(mesh, jnp.int32, size, width),
        None,
        _split(lambda: _rollout(size, *lengths), mesh),
      ),
      {'recipe': recipe},
      (*states, *scoring, 'rollout', 'experience'),
      (*scoring, 'critic parameters'),
    )
  )
  rows = jax.ShapeDtypeStruct((ppo.minibatch,), jnp.int32, sharding=sharding.replicated(mesh))
  coef = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
  static = {'recipe': recipe, 'total_steps': 100}
  alive = (*states, *waiting, 'experience')
  for name, step, more in (('policy', policy_step, (coef,)), ('critic', critic_step, ())):
    state = f'{name} state'
    arguments = (held[state], experience, rows, *more)
    phases.append(Phase(f'{name} update', step, arguments, static, alive, (state, 'experience')))
  held['critic parameters'] = held['critic state'].params
  return Program(held, phases, networks)


def _generation(
  s: Settings, config: LlamaConfig, held: dict[str, Any], mesh: Mesh, prompt: int
) -> Iterator[Phase]:
  """The phases of a rollout; adds what they hold."""
  decoder = generation.make_decoder(config, rollouts.sampling(s.rollout), STOP_IDS, mesh)
  before, positions = generation.cache_positions(prompt, decoder)
  slots = s.rollout.slots or s.ppo.rollout_batch
  static = {'decoder': decoder}
  params = held['policy state'].params
  held['decode weights'] = weights = _result(mesh, decode.weights, params, **static)
  cache = functools.partial(_result, mesh, decode.empty, **static)
  held['cache'] = full = cache(slots, positions)
  held['cache before'] = cache(slots, before) if before else ()
  prompts = s.ppo.rollout_batch // s.rollout.samples
  rows, size = generation.prefill_rows(min(prompts, slots), prompt, decoder, mesh)
  ids = jax.ShapeDtypeStruct((rows, size), jnp.int32, sharding=sharding.replicated(mesh))
  length = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sharding.replicated(mesh))
  with_cache = ('decode weights', 'cache')
  yield Phase('decode weights', decode.weights, (params,), static, (), ('policy parameters',))
  held['policy parameters'] = params
  prefill = (weights, ids, length)
  yield Phase('prefill', decode.prefill, prefill, static, with_cache, ('decode weights',))
  if before:
    grow = (held['cache before'], None, positions)
    alive = ('decode weights', 'cache before')
    yield Phase('cache growth', decode.resize, grow, static, alive, ('cache before',))
  yield Phase('decode chunk', decode.advance, (weights, full), static, with_cache, with_cache)


def _reward(s: Settings, network: LlamaConfig, mesh: Mesh) -> Program:
  trained, _ = as_run(network, s.runtime, mesh, trained=True)
  frozen, _ = as_run(network, s.runtime, mesh, trained=False)
  scorer = Scorer(trained, frozen, Cutter(s.reward.segmentation))
  held = {'reward model state': _state(trained, 'scalar', s.reward.optimizer, s, mesh)}
  if scorer.cutter.needs_entropy and not s.reward.entropy_cache:
    held['reference'] = _params(frozen, 'language', s.runtime.dtype, mesh)
  held['pairs'] = _split(lambda: _pairs(s.reward.batch, s.data.max_length), mesh)
  static = {'scorer': scorer, 'settings': s.reward, 'total_steps': 100}
  names = tuple(held)
  given = held['reward model state'], held.get('reference'), held['pairs']
  phase = Phase('reward model update', reward_step, given, static, names, names)
  return Program(held, [phase], {'reward': trained, 'reference': frozen})


def _sft(s: Settings, network: LlamaConfig, mesh: Mesh) -> Program:
  trained, _ = as_run(network, s.runtime, mesh, trained=True)
  shape = s.sft.batch, s.data.max_length
  held = {
    'policy state': _state(trained, 'language', s.sft.optimizer, s, mesh),
    'rows': TokenBatch(_batch(mesh, jnp.int32, *shape), _batch(mesh, jnp.bool_, *shape)),
  }
  static = {'config': trained, 'settings': s.sft, 'total_steps': 100}
  phase = Phase('policy update', sft_step, tuple(held.values()), static, tuple(held), tuple(held))
  return Program(held, [phase], {'policy': trained})


JOBS = {'sft': _sft, 'reward': _reward, 'ppo': _ppo}
