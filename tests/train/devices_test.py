"""Eight devices (data 2, fsdp 2, tensor 2) equal one device, and communicate little."""

import contextlib
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, training
from model.sharding_test import assert_moments_follow
from numpy.testing import assert_allclose

from segjax.model import decode, sharding
from segjax.model.decode_weights import decode_weights
from segjax.model.generate import make_decode_config
from segjax.model.mesh import decode_mesh
from segjax.rl.critic_free import ESTIMATORS
from segjax.train.experience import make_experience
from segjax.train.metrics import Metrics
from segjax.train.mixed_step import MixedBatch, mixed_step
from segjax.train.ppo_step import Minibatch, critic_step, policy_step, ppo_step
from segjax.train.preference_step import FrozenParams, preference_step
from segjax.train.rollout import make_sampling
from segjax.train.rollout_scoring import score
from segjax.train.scoring import score_chunk
from segjax.train.sft_step import sft_step
from segjax.types import Normalizer

NORMALIZER = jax.tree.map(jnp.float32, Normalizer(0.2, -0.1, 0.3, 0.8))
KL_COEF = np.float32(0.1)


class Training(NamedTuple):
  """Three steps of a training, and its compiled programs."""

  metrics: list[dict[str, Any]]
  before: dict[str, Any]  # initial parameters by network, on the host
  states: dict[str, Any]
  warnings: list[str]  # of the partitioner
  compiled: Callable[[], list[Any]]  # the programs

  @property
  def program(self):
    """The programs of one device, as HLO."""
    return ''.join(each.as_text() for each in self.compiled())

  @property
  def updated(self):
    """Bytes of its arguments that each program reuses for its output, on one device."""
    return [each.memory_analysis().alias_size_in_bytes for each in self.compiled()]


def program(function, *arguments, **static):
  """Returns the compiled program, which the call before it has left in the cache of jit."""
  return function.lower(*arguments, **static).compile()


@contextlib.contextmanager
def captured_warnings(mesh, *functions):
  """Yields a list that holds the partitioner's warnings, once the block has ended.

  Compiles the functions again, because another test may have left their programs in this process.
  One device has no partitioner.
  """
  warnings = []
  if mesh.size == 1:
    yield warnings
    return
  for function in functions:
    function.clear_cache()
  with models.captured_stderr() as lines:
    yield warnings
  warnings += models.rematerialisations(lines)


def train(mesh, function, states, *arguments, jitted=None, **static):
  """Runs three steps of `function`, which may be a host function that calls `jitted` ones."""
  jitted = jitted or {function: tuple(states)}
  before = {name: training.copied(state.params) for name, state in states.items()}
  metrics = []
  with captured_warnings(mesh, *jitted) as warnings:
    for step in range(3):
      step_arguments = [x(step) if callable(x) else x for x in arguments]
      *new, output = function(*states.values(), *step_arguments, **static)
      states = dict(zip(states, new, strict=True))
      metrics.append(jax.device_get(output.flat() if isinstance(output, Metrics) else output))

  @functools.cache
  def compiled():
    programs = []
    for each, names in jitted.items():
      num_others = num_required(each) - len(names)
      arguments = *(states[name] for name in names), *step_arguments[:num_others]
      with jax.set_mesh(mesh):
        programs.append(program(each, *arguments, **static))
    return programs

  return Training(metrics, before, states, warnings, compiled)


@functools.cache
def sft(devices, name):
  config, mesh = models.CONFIGS[name], models.mesh(devices)
  with jax.set_mesh(mesh):
    states = {'policy': training.state('policy', mesh, config)}
    static = {'config': config, 'settings': training.FINE_TUNING, 'total_steps': training.TOTAL}
    return train(mesh, sft_step, states, training.conversations(mesh), **static)


@functools.cache
def reward(devices):
  mesh = models.mesh(devices)
  with jax.set_mesh(mesh):
    states = {'reward': training.state('reward', mesh)}
    arguments = FrozenParams(training.network('reference', mesh)), training.pairs(mesh)
    static = {'scorer': training.SCORER, 'settings': training.REWARD}
    static |= {'total_steps': training.TOTAL}
    return train(mesh, preference_step, states, *arguments, **static)


@functools.cache
def mixed(devices):
  mesh = models.mesh(devices)
  with jax.set_mesh(mesh):
    states = {'reward': training.state('reward', mesh)}
    steps = sharding.place_batch(training.labelled_steps(), mesh)
    batch = MixedBatch(training.pairs(mesh), steps)
    static = {'scorer': training.SCORER, 'settings': training.REWARD}
    static |= {'total_steps': training.TOTAL}
    frozen = FrozenParams(training.network('reference', mesh))
    return train(mesh, mixed_step, states, frozen, batch, **static)


def num_required(function):
  """Returns the number of positional arguments without a default."""
  parameters = inspect.signature(function).parameters.values()
  kinds = [p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
  return sum(p.default is p.empty for p in kinds)


class Scored(NamedTuple):
  """A rollout, its experience, and the programs that computed them."""

  rollout: Any
  outputs: Any  # of the networks
  experience: Any
  metrics: dict[str, Any]
  programs: dict[str, Callable[[], str]]
  warnings: dict[str, list[str]]


def decode_program(params, mesh):
  """Returns the program of a chunk of decode steps for four rows of two pages, as HLO."""
  decoder = make_decode_config(
    models.CONFIG, make_sampling(training.ROLLOUT), models.STOP_IDS, mesh
  )
  mesh = decode_mesh(mesh, models.CONFIG.num_attention_heads, models.CONFIG.num_key_value_heads)
  with jax.set_mesh(mesh):
    weights = decode_weights(params, decoder=decoder)
    pages = decode.empty_pages(mesh.shape['data'], 9, decoder=decoder)
    arguments = weights, pages, decode.empty_rows(4, 2), np.int32(4), np.zeros(2, np.uint32)
    return program(decode.decode_chunk, *arguments, decoder=decoder).as_text()


def score_program(params, rollout, recipe, mesh):
  """Returns the program that scores four rows, as HLO."""
  with jax.set_mesh(mesh):
    piece = jax.tree.map(lambda x: x[:4], rollout)
    piece = jax.device_put(piece, jax.tree.map(lambda x: x.sharding, rollout))
    ids = jnp.concatenate([piece.prompt_ids, piece.response_ids], axis=1)
    return program(score_chunk, params, ids, None, piece, recipe=recipe).as_text()


def captured(warnings, name, mesh, function, run):
  with captured_warnings(mesh, function) as warnings[name]:
    return jax.block_until_ready(run())


@functools.cache
def scored(devices):
  mesh, recipe, warnings = models.mesh(devices), training.recipe(recompute_logprob=True), {}
  with jax.set_mesh(mesh):
    params = {name: training.network(name, mesh) for name in training.SEEDS}
    with captured_warnings(mesh, decode.decode_chunk) as warnings['generate']:
      sampled = training.sample(params['policy'], mesh)
      length, rollout = sampled.length, jax.block_until_ready(sampled.arrays)
    outputs = captured(
      *(warnings, 'score', mesh, score_chunk), lambda: score(params, rollout, length, recipe=recipe)
    )
    experience, metrics = captured(
      *(warnings, 'experience', mesh, make_experience),
      lambda: make_experience(rollout, outputs, NORMALIZER, KL_COEF, recipe=recipe),
    )
  programs = {
    'generate': functools.partial(decode_program, params['policy'], mesh),
    'score': functools.partial(score_program, params, rollout, recipe, mesh),
  }
  return Scored(rollout, outputs, experience, metrics, programs, warnings)


@functools.cache
def ppo(devices):
  mesh = models.mesh(devices)
  experience = scored(devices).experience
  rows = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [6, 0, 5, 3]])
  with jax.set_mesh(mesh):
    states = {name: training.state(name, mesh) for name in ('policy', 'critic')}
    static = {'recipe': training.recipe(), 'total_steps': training.TOTAL}
    arguments = (lambda step: Minibatch(experience, rows[step])), KL_COEF
    jitted = {policy_step: ('policy',), critic_step: ('critic',)}
    return train(mesh, update_both, states, *arguments, jitted=jitted, **static)


def update_both(policy, critic, *arguments, **static):
  states, metrics = ppo_step({'policy': policy, 'critic': critic}, {}, *arguments, **static)
  return *states.values(), metrics


TRAININGS = {
  'sft': functools.partial(sft, name='untied'),
  'sft_tied': functools.partial(sft, name='tied'),
  'reward': reward,
  'mixed': mixed,
  'ppo': ppo,
}


# The default tier runs the quickest of five: PPO alone takes half a minute.
CASES = [
  'sft_tied',
  *(pytest.param(name, marks=pytest.mark.devices) for name in ('sft', 'reward', 'mixed', 'ppo')),
]


@pytest.mark.parametrize('name', CASES)
def test_same_losses(name):
  one, eight = TRAININGS[name](1), TRAININGS[name](8)
  for step, (expected, got) in enumerate(zip(one.metrics, eight.metrics, strict=True)):
    assert not got['skipped_updates']
    for key in expected:
      if 'loss' in key:
        # float32 sums in another order; a policy loss is a difference of numbers of size 1.
        assert_allclose(got[key], expected[key], rtol=1e-5, atol=1e-6, err_msg=f'{key} {step}')


@pytest.mark.parametrize('name', CASES)
def test_same_updates(name):
  """The updates of every tensor over three steps are within 1e-4 of their norm."""
  one, eight = TRAININGS[name](1), TRAININGS[name](8)
  for network, start in one.before.items():
    new = {n: training.copied(run.states[network].params) for n, run in ((1, one), (8, eight))}
    moved = {n: jax.tree.map(np.subtract, new[n], start) for n in new}
    for path, expected in jax.tree_util.tree_leaves_with_path(moved[1]):
      got = functools.reduce(lambda tree, key: tree[key.key], path, moved[8])
      size = np.linalg.norm(expected)
      assert size > 1e-3
      assert np.linalg.norm(got - expected) <= 1e-4 * size, (network, path)


@pytest.mark.parametrize('name', CASES)
def test_state_stays_split(name):
  for network, state in TRAININGS[name](8).states.items():
    assert_moments_follow(state)
    assert int(state.step) == 3
    layers = state.params['backbone']['layers']
    shard = layers['up']['kernel'].addressable_shards[0].data
    assert shard.shape == (2, 16, 24), network
    assert 'tensor' in str(layers['up']['kernel'].sharding.spec)


@pytest.mark.compiled
@pytest.mark.parametrize('name', TRAININGS)
def test_training_does_not_rematerialise(name):
  assert TRAININGS[name](8).warnings == []


@pytest.mark.compiled
@pytest.mark.parametrize('name', ['generate', 'score', 'experience'])
def test_rollouts_do_not_rematerialise(name):
  assert scored(8).warnings[name] == []


@pytest.mark.devices
def test_same_rollout():
  one, eight = scored(1).rollout, scored(8).rollout
  for name in ('prompt_ids', 'prompt_length', 'response_ids', 'response_mask', 'finished'):
    np.testing.assert_array_equal(getattr(eight, name), getattr(one, name), err_msg=name)
  assert_allclose(eight.old_logprob, one.old_logprob, rtol=0, atol=1e-5)  # float32


@pytest.mark.devices
def test_same_experience():
  one, eight = scored(1), scored(8)
  # float32
  jax.tree.map(functools.partial(assert_allclose, rtol=1e-5, atol=1e-5), eight.outputs, one.outputs)
  for name in ('start', 'end', 'segment_id', 'num_segments'):
    got, expected = (getattr(run.experience.segments, name) for run in (eight, one))
    np.testing.assert_array_equal(got, expected, err_msg=name)
  for name in ('reward', 'advantage', 'return_'):
    got, expected = getattr(eight.experience, name), getattr(one.experience, name)
    assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=name)  # sums over a response
  for name, expected in one.metrics.items():
    assert_allclose(eight.metrics[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
  segments, length = (one.metrics[k] for k in ('segments/per_response', 'response/length_mean'))
  assert 1 < segments < length - 1  # segments are neither single tokens nor the full response


@pytest.mark.devices
@pytest.mark.parametrize('estimator', ESTIMATORS)
def test_same_advantages_of_groups(estimator):
  """Two prompts of four responses, each group on several devices."""
  ppo = dataclasses.replace(training.PPO_SETTINGS, estimator=estimator, whiten=False)
  recipe, advantages = training.recipe(ppo=ppo, samples_per_prompt=4), []
  for devices in (1, 8):
    sampled = scored(devices)
    outputs = sampled.outputs._replace(value=None)
    with jax.set_mesh(models.mesh(devices)):
      experience, _ = make_experience(sampled.rollout, outputs, NORMALIZER, KL_COEF, recipe=recipe)
    advantages.append(np.asarray(experience.advantage))
    assert experience.advantage.sharding == sampled.experience.advantage.sharding
  one, eight = advantages
  assert np.abs(one).max() > 0.1
  assert_allclose(eight, one, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def computations(text):
  """Returns the lines of each computation of an HLO module, by name."""
  lines, name = {}, None
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith(' ') and not line.startswith('HloModule'):
      name = line.removeprefix('ENTRY ').split()[0].lstrip('%')
      lines[name] = []
    elif name:
      lines[name].append(line)
  return lines


def gathers(text, loops_only=False):
  """Returns the shapes of the results of all-gathers, optionally inside while loops only."""
  programs = computations(text)
  names = set(programs)
  if loops_only:
    names = set(re.findall(r' while\(.*body=%?([\w.\-]+)', text))
    assert names
    calls = r'(?:body|condition|to_apply|calls)=%?([\w.\-]+)'
    while (
      more := {c for n in names for line in programs[n] for c in re.findall(calls, line)} - names
    ):
      names |= more
  shapes = []
  for name in names:
    for line in programs[name]:
      if match := re.search(r'= (.*?) all-gather(?:-start)?\(', line):
        shapes += [tuple(map(int, x.split(','))) for x in re.findall(r'\[([\d,]+)\]', match[1])]
  return shapes


@pytest.mark.compiled
@pytest.mark.parametrize('name', TRAININGS)
def test_states_are_updated_in_place(name):
  """Every byte of the state is donated: weights and moments exist once."""
  training_run = TRAININGS[name](8)
  for state, updated in zip(training_run.states.values(), training_run.updated, strict=True):
    assert updated == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))


@pytest.mark.compiled
def test_residuals_are_split_over_the_tensor_axis():
  """Each layer saves [L, B/4, S/2, D] for the backward pass on a (2, 2, 2) mesh."""
  layers, width = models.CONFIG.num_hidden_layers, models.CONFIG.hidden_size
  residuals = {
    shape
    for shape in re.findall(r'f32\[([\d,]+)\]', sft(8, name='untied').program)
    if shape.startswith(f'{layers},2,') and shape.endswith(f',{width}')
  }
  assert residuals == {f'{layers},2,{models.LENGTH // 2},{width}'}


@pytest.mark.compiled
# On each device: 2 of 8 rows, half of a vocabulary of 80, width 32.
@pytest.mark.parametrize('name', [*TRAININGS, 'score'])
def test_no_gather_of_logits(name):
  text = scored(8).programs['score']() if name == 'score' else TRAININGS[name](8).program
  shapes = gathers(text)
  assert shapes  # weights are gathered along fsdp
  for shape in shapes:
    if {40, 80} & set(shape):
      assert sorted(shape) == [32, 40], shape  # embedding or head, split by vocabulary


@pytest.mark.compiled
def test_decode_loop_gathers_no_weights():
  shapes = gathers(scored(8).programs['generate']())
  assert shapes  # activations of one token of a few rows
  smallest = models.CONFIG.hidden_size * models.CONFIG.num_key_value_heads * models.CONFIG.head_dim
  assert max(map(math.prod, shapes)) < smallest // 2  # of the weights in a layer
