"""Plans of tiny networks on CPU devices: peak memory, suggestions, properties of programs."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import subprocess
import sys

import jax
import pytest

from segjax.config.settings import Lora, Network, Settings, replace
from segjax.model.chips import CHIPS
from segjax.model.llama import make_config
from segjax.model.mesh import make_mesh
from segjax.plan import (
  abstract_arrays,
  generation_phases,
  phases,
  plan_report,
  planner,
  program_figures,
  suggestions,
  topologies,
)
from segjax.plan.lengths import KINDS
from segjax.plan.ppo_programs import PPO
from segjax.plan.programs import DPO, REWARD

TOPOLOGY = topologies.parse('cpu:8')
SETTINGS = replace(
  Settings(),
  stages=('ppo',),
  network=Network(512, 32, 48, 2, 4, 2, 128),
  **{
    'data.max_prompt_length': 16,
    'data.max_length': 48,
    'rollout.max_new_tokens': 64,
    'rollout.max_concurrent': 16,
    'ppo.rollout_batch_size': 16,
    'ppo.minibatch_size': 16,
    'ppo.micro_batch_size': 8,
    'ppo.scoring_batch_size': 8,
    'runtime.vocab_chunk_size': 128,
  },
)
SMALL = ('decode chunk', 'critic update')


def with_memory(size):
  return dataclasses.replace(TOPOLOGY, chip=dataclasses.replace(TOPOLOGY.chip, memory=size))


@functools.cache
def make_plan(settings=SETTINGS, names=SMALL, size=math.inf):
  return planner.make_plan(PPO, settings, with_memory(size), names)


def test_names_of_topologies():
  assert topologies.parse('v5p:4x4x8').count == 128
  assert topologies.parse('v5e:8x8').chip.memory == 15.75 * 2**30
  h100 = topologies.parse('cuda:8xH100-80GB')
  assert h100.count == 8 and h100.is_cuda and not h100.is_tpu
  nodes = topologies.parse('cuda:4x8xA100-80GB')
  assert (nodes.nodes, nodes.count, nodes.chip.name) == (4, 32, 'A100-80GB') and nodes.is_cuda
  for name in ('v7:2x2', 'v5p:3x3', 'cuda:8xB7', 'cpu:0', ''):
    with pytest.raises(
      ValueError, match=r'does not exist; use one of\n.*8x8 \(64\).*15.75 GiB'
    ) as error:
      topologies.parse(name)
    assert 'H100-80GB' in str(error.value)


def test_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"needs libtpu.*pip install -e '\.\[plan\]'"):
    topologies.prepare(topologies.parse('v5p:2x2x2'))
  with pytest.raises(ValueError, match=r"8xH100-80GB needs jax's CUDA plugin.*'\.\[plan\]'\.$"):
    topologies.prepare(topologies.parse('cuda:8xH100-80GB'))


def test_a_run_without_a_critic_plans_fewer_bytes():
  """Neither its state, nor its update, nor an array for it in a rollout; the rest is the same."""
  network, mesh = make_config(SETTINGS.network), make_mesh(devices=jax.devices())
  without = replace(SETTINGS, **{'ppo.estimator': 'reinforce_plus_plus'})
  full, fewer = (
    PPO.programs(settings, network, mesh, 2**40, KINDS[0]) for settings in (SETTINGS, without)
  )
  sizes, smaller = full.sizes(), fewer.sizes()
  assert sizes.pop('critic state') > 0
  assert smaller.keys() == sizes.keys()
  assert {name for name in sizes if smaller[name] != sizes[name]} == {'experience'}
  assert smaller['experience'] < sizes['experience']
  names = [phase.name for phase in full.phases]
  assert [phase.name for phase in fewer.phases] == [n for n in names if n != 'critic update']
  assert not any('critic' in name for phase in fewer.phases for name in phase.live)
  assert not any('critic' in key for key in PPO.optimizers(without))


@pytest.mark.plan
def test_peak_is_live_arrays_plus_temporaries_and_outputs():
  plan = make_plan()
  assert [m.name for m in plan.phases] == list(SMALL)
  for measured in plan.phases:
    phase = next(p for p in plan.programs.phases if p.name == measured.name)
    live = sum(abstract_arrays.bytes_per_device(plan.programs.trees[name]) for name in phase.live)
    extra = measured.temporaries + measured.outputs - measured.aliased
    # The programs have a few more scalars among their arguments.
    assert measured.peak == pytest.approx(live + extra, rel=0.02)
  state = plan.programs.trees['critic state']
  # Weight and two moments, split over eight devices except for norms and step counts.
  weights = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  assert abstract_arrays.bytes_per_device(state) == pytest.approx(3 * 4 * weights / 8, rel=0.1)


def test_a_trained_head_is_planned_in_float32_with_its_moments():
  mesh, sizes = make_mesh(1, 8, 1), []
  s = replace(SETTINGS, **{'runtime.param_dtype': 'bfloat16'})
  for train_head in (False, True):
    lora = Lora(4, 8.0, ('q_proj',), train_head=train_head)
    config = dataclasses.replace(make_config(s.network), lora=lora)
    state = abstract_arrays.state(config, 'language', s.ppo.policy_optimizer, s, mesh)
    sizes.append(abstract_arrays.bytes_per_device(state))
  assert sizes[1] - sizes[0] == 3 * 4 * s.network.hidden_size * s.network.vocab_size / 8


@pytest.mark.plan
def test_too_little_memory_gives_suggestions():
  update = functools.partial(make_plan, names=('critic update',))
  peak = update().peak
  plan = update(size=peak - 1)
  assert update(size=peak).fits and not update(size=peak).suggestions
  assert not plan.fits
  text = '\n'.join(plan.suggestions)
  for flag in (
    'runtime.frozen_params_memory=host',
    'moments_dtype=bfloat16',
  ):
    assert f'--config.{flag}' in text or flag in text, text
  assert 'they fit' in plan.suggestions[-1]


@pytest.mark.plan
def test_predicted_peak_is_that_of_a_new_plan():
  plan, network = make_plan(), make_config(SETTINGS.network)
  mesh = make_mesh(devices=jax.devices())
  measured = suggestions.Measured(PPO, SETTINGS, network, mesh, plan.phases, math.inf, KINDS[0])
  for key, value in (
    ('runtime.frozen_params_memory', 'host'),
    ('ppo.critic_optimizer.moments_dtype', 'bfloat16'),
  ):
    change = suggestions.SettingChange(key, value)
    predicted = suggestions.peak_with([change], measured)
    assert predicted < plan.peak
    assert predicted == pytest.approx(make_plan(replace(SETTINGS, **{key: value})).peak, rel=0.03)


def test_tokens_are_lowered_where_they_are_counted():
  """Down to a row of the longest sequences, of 80 tokens, on each device."""
  changes = {'ppo.micro_batch_size': 0, 'ppo.micro_batch_tokens': 160}
  measured = suggestions.Measured(
    PPO,
    replace(SETTINGS, **changes),
    make_config(SETTINGS.network),
    make_mesh(devices=jax.devices()),
    [],
    math.inf,
    KINDS[0],
  )
  flags = [str(change) for change in suggestions._changes(measured)]
  assert '--config.ppo.micro_batch_tokens=80' in flags
  assert not any('micro_batch_size' in flag or 'tokens=40' in flag for flag in flags)


def test_packed_scoring_has_fewer_tokens_with_its_updates():
  packed = {'ppo.packing_length': 80, 'ppo.micro_batch_size': 4}
  for changes, key in (
    ({}, 'ppo.scoring_batch_size'),
    (packed, 'ppo.micro_batch_size'),
    (packed | {'reward_shaping.redistribute': 'gradient'}, 'ppo.scoring_batch_size'),
  ):
    at_once = PPO.rows_at_once(replace(SETTINGS, **changes))
    assert [each.key for each in at_once if 'scoring' in each.phases] == [key]


@pytest.mark.plan
def test_time_of_a_step(tmp_path):
  """Arithmetic of packed updates: three forward passes and that of remat, padding included."""
  settings = replace(
    SETTINGS,
    **{'ppo.packing_length': 128, 'ppo.micro_batch_tokens': 128, 'ppo.micro_batch_size': 0},
    **{'data.max_prompt_length': 64},
  )
  h100 = dataclasses.replace(CHIPS['H100-80GB'], memory=math.inf)
  topology = dataclasses.replace(TOPOLOGY, chip=h100)
  names, kinds = ('critic update',), ('maximum', 'ultrafeedback')
  at_limit, drawn = (
    planner.make_plan(PPO, settings, topology, names, tmp_path, kind) for kind in kinds
  )
  (update,) = at_limit.phases
  assert update.cost.calls == 1 and update.cost.exchanged > 0
  # 16 texts of 128 tokens in two pieces of a row per device; matrix products alone.
  model = update.model_flops / TOPOLOGY.count
  assert 4 / 3 < update.cost.flops / model < 4 / 3 * 1.5
  assert drawn.phases[0].cost.flops <= update.cost.flops
  assert drawn.phases[0].model_flops < update.model_flops
  # What is printed as JSON is what was compiled, and what is kept is read back.
  again = planner.make_plan(PPO, settings, topology, names, tmp_path, 'maximum')
  assert again.phases == at_limit.phases
  record = json.loads(plan_report.to_json(at_limit))
  assert record['lengths'] == 'maximum' and record['seconds_per_step'] is None
  assert record['phases'][0]['cost']['bound'] in ('arithmetic', 'memory', 'links')
  assert 0 < record['update_mfu'] < 1


@pytest.mark.plan
def test_same_program_is_compiled_once(tmp_path, monkeypatch):
  names = ('prefill',)
  first = planner.make_plan(PPO, SETTINGS, TOPOLOGY, names, tmp_path)
  monkeypatch.setattr(program_figures, '_compile', None)
  again = planner.make_plan(PPO, SETTINGS, TOPOLOGY, names, tmp_path)
  assert again.phases == first.phases
  with pytest.raises(TypeError):  # another program
    planner.make_plan(
      PPO, replace(SETTINGS, **{'rollout.max_concurrent': 8}), TOPOLOGY, names, tmp_path
    )


class Lowered:
  """A program whose compiler raises these errors in turn."""

  def __init__(self, *errors):
    self.errors, self.options = list(errors), []

  def compile(self, compiler_options=None):
    self.options.append(compiler_options)
    if self.errors:
      raise jax.errors.JaxRuntimeError(self.errors.pop(0))
    return 'compiled'


def test_a_program_that_does_not_fit_is_compiled_all_the_same():
  exhausted = 'RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM. HLO module: jit_f.\nmore'
  lowered = Lowered(exhausted)
  assert abstract_arrays.compile_program(lowered) == 'compiled'
  assert lowered.options == [{}, {'xla_tpu_no_crash_on_oom': 'true'}]
  # A compiler without that option.
  lowered = Lowered(exhausted, 'INVALID_ARGUMENT: No such compile option')
  refused = program_figures._compile(lowered, None, TOPOLOGY, [])
  assert refused.refused.startswith('E1000: Ran out of memory on HBM.')
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    abstract_arrays.compile_program(Lowered('INTERNAL: something else'))


def test_generation_that_the_compiler_refuses_is_a_row(monkeypatch, capsys):
  """Layouts are asked of the compiler while the programs are made; nothing else is compiled."""

  def refuse(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory\n allocating weights')

  monkeypatch.setattr(generation_phases, 'decode_programs', refuse)
  plan = planner.make_plan(PPO, SETTINGS, TOPOLOGY, ('decode weights', 'decode chunk'))
  assert [m.refused for m in plan.phases] == ['out of memory allocating weights'] * 2
  assert not plan.fits and plan.suggestions
  plan_report.print_plan(plan)
  assert re.search(r'decode chunk .* refused\n', capsys.readouterr().out)
  assert json.loads(plan_report.to_json(plan))['fits'] is False


@pytest.mark.plan
def test_pages_that_do_not_fit_are_rows():
  """A run would be refused; the phase is measured with a row per group, and so are the others."""
  plan = make_plan(size=1)
  chunk, update = plan.phases
  assert 'decoding needs' in chunk.refused and chunk.peak > 0
  assert not update.refused and update.peak > 0
  assert not plan.fits and 'not enough: use more chips' in plan.suggestions[-1]


@pytest.mark.plan
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_slice_that_is_too_small_gets_a_plan_and_two_run_at_once():
  command_line = [
    *(sys.executable, 'tools/plan.py', '--config=configs/ppo.py:llama3_8b_sft', '--plans='),
    *('--topology=v6e:2x2', '--phases=prefill'),
  ]
  start = functools.partial(subprocess.Popen, text=True, stdout=-1, stderr=-1)
  for process in (start(command_line), start(command_line)):
    out, errors = process.communicate()
    assert process.returncode == 1 and 'Traceback' not in errors, errors
    assert re.search(r'prefill .* refused\n', out) and out.endswith('it does NOT fit\n')
    assert '--config.runtime.frozen_params_memory=host' in out


@pytest.mark.plan
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed')
def test_a_small_model_decodes_a_whole_rollout_on_a_host_of_small_tpus(tmp_path):
  """SmolLM2-135M, whose 3 key heads of 64 numbers fill no tile of a TPU."""
  command = [
    *(sys.executable, 'tools/plan.py', '--config=configs/ppo.py:smollm2_135m,v5e:2x4', '--json'),
    *(f'--plans={tmp_path}', '--phases=prefill,page copies,decode chunk'),
  ]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  record = json.loads(done.stdout.splitlines()[-1])
  assert record['fits']
  for phase in record['phases']:  # no second set of pages, of 13 GiB
    assert phase['temporaries'] < 2**30 < phase['aliased'], phase


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'ppo.micro_batch_size': 4, 'ppo.minibatch_size': 4}, 'does not divide over the 8 devices'),
    ({'mesh.data': 3}, 'does not use the 8 devices exactly'),
    ({'mesh.tensor': 4}, r'mesh.tensor=4 does not divide the 4 query and 2 key heads'),
    ({'network.vocab_size': 0}, 'sizes of the network are unknown; use a preset'),
  ],
)
def test_settings_that_cannot_be_planned(changes, message):
  with pytest.raises(ValueError, match=message):
    planner.make_plan(PPO, replace(SETTINGS, **changes), TOPOLOGY, SMALL)
  with pytest.raises(ValueError, match="--phases: 'polcy' is not one of decode weights"):
    planner.make_plan(PPO, SETTINGS, TOPOLOGY, ('polcy',))


CACHED = {'reward.entropy_cache_dir': 'run', 'reward.segmentation.boundary': 'entropy'}


@pytest.mark.plan
@pytest.mark.parametrize(
  ('job', 'name', 'changes'),
  [
    (PPO, 'rewards', {}),
    (
      PPO,
      'critic update',
      {'ppo.packing_length': 80, 'ppo.micro_batch_size': 0, 'ppo.micro_batch_tokens': 160},
    ),
    (REWARD, 'held-out pairs', {}),
    (REWARD, 'reward model update', CACHED),
    (DPO, 'policy update', {}),
  ],
)
def test_other_phases_compile(job, name, changes):
  settings = replace(SETTINGS, **{'reward.batch_size': 8, 'dpo.batch_size': 8, **changes})
  (measured,) = planner.make_plan(job, settings, TOPOLOGY, (name,)).phases
  assert measured.arguments > 0 and not measured.refused
  if name == 'critic update':  # the packing plan is one more argument
    assert measured.arguments > make_plan(names=(name,)).phases[0].arguments


def write_forms(path, pairs, labelled):
  rows = [{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}] * pairs
  rows += [{'prompt': 'a', 'response': 'b', 'steps': [[1, 1]]}] * labelled
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return {'data.path': str(path), 'reward.batch_size': 16}


PACKED = {'reward.packing_length': 64, 'reward.micro_batch_tokens': 128}


@pytest.mark.plan
@pytest.mark.parametrize(
  'values', [{'reward.micro_batch_size': 8}, PACKED, {'lora.rank': 2}], ids=str
)
def test_an_update_on_pairs_and_labelled_steps_is_planned(tmp_path, values):
  """More labelled rows than pairs: activations of a part, and a second gradient."""
  plans = [
    planner.make_plan(
      REWARD,
      replace(SETTINGS, **write_forms(tmp_path / f'{labelled}.jsonl', 10, labelled) | values),
      with_memory(1),
      ('reward model update',),
      lengths='maximum',
    )
    for labelled in (0, 25)
  ]
  pairs, mixed = plans
  assert pairs.programs.note == '' and '16 pairs and 40 responses with' in mixed.programs.note
  ids, labels = mixed.programs.trees['labelled rows']
  assert ids.shape == labels.shape == (40, 48)
  assert not mixed.phases[0].refused and not mixed.fits
  rows = abstract_arrays.bytes_per_device((ids, labels))
  assert mixed.phases[0].arguments >= pairs.phases[0].arguments + rows
  gradient = abstract_arrays.bytes_per_device(mixed.programs.trees['reward model state'].params)
  assert mixed.peak >= pairs.peak + rows + gradient // 2
  both, alone = (plan.programs for plan in (mixed, pairs))
  assert both.tokens > alone.tokens and both.phases[0].model_flops > alone.phases[0].model_flops
  assert mixed.suggestions and 'not enough' in mixed.suggestions[-1]


@pytest.mark.plan
def test_labelled_steps_alone_are_planned(tmp_path):
  settings = replace(SETTINGS, **write_forms(tmp_path / 'rows.jsonl', 0, 5))
  plan = planner.make_plan(REWARD, settings, TOPOLOGY)
  assert [phase.name for phase in plan.phases] == ['reward model update', 'held-out steps']
  assert plan.programs.note == (
    '5 of 5 rows have labelled steps: an update has 16 responses with labelled steps'
  )
  pairs = planner.make_plan(REWARD, replace(settings, **{'data.path': 'owner/name'}), TOPOLOGY)
  assert plan.peak < pairs.peak and 'pairs alone' in pairs.programs.note
  assert json.loads(plan_report.to_json(pairs))['note'] == pairs.programs.note
  assert 'reference' not in plan.programs.trees


@pytest.mark.plan
def test_a_language_model_that_rewards_is_planned():
  lm_reward = {'reward_shaping.lm_reward.kind': 'implicit', 'reward_shaping.lm_reward.path': 'x'}
  with_model = make_plan(replace(SETTINGS, **lm_reward), ('scoring',))
  without = make_plan(names=('scoring',))
  sizes = with_model.programs.sizes()
  assert sizes['reward language model'] == without.programs.sizes()['reference']
  (more,), (fewer,) = with_model.phases, without.phases
  assert more.arguments > fewer.arguments and not more.refused


@pytest.mark.plan
def test_listed_reward_models_are_planned():
  lines = ('second path=x granularity=token', 'brief fn=m:f')
  phases_ = ('scoring', 'rewards')
  listed = make_plan(replace(SETTINGS, rewards=lines), phases_)
  without = make_plan(names=phases_)
  sizes = listed.programs.sizes()
  assert sizes['reward model second'] == sizes['reward model'] and 'reward model brief' not in sizes
  for more, fewer in zip(listed.phases, without.phases, strict=True):
    assert more.arguments > fewer.arguments and not more.refused


@functools.cache
def compiled(name='policy update', **changes):
  """Returns the compiled program of a phase; keys of `changes` have __ for a dot."""
  settings = replace(SETTINGS, **{key.replace('__', '.'): v for key, v in changes.items()})
  mesh = make_mesh(devices=jax.devices())
  program = PPO.programs(settings, make_config(settings.network), mesh, math.inf, 'ultrafeedback')
  phase = next(p for p in program.phases if p.name == name)
  return phases.lower_phase(phase, mesh).compile()


@pytest.mark.plan
@pytest.mark.parametrize('name', ['policy update', 'scoring'])
def test_no_logits_of_full_rows(name):
  """No array has the vocabulary, except the embedding and the head, whole or a device's part."""
  network = dataclasses.replace(SETTINGS.network, vocab_size=4096)
  text = compiled(name, network=network).as_text()
  shapes = [[int(n) for n in shape.split(',')] for shape in re.findall(r'f32\[([\d,]+)\]', text)]
  tokens, piece = 80, SETTINGS.runtime.vocab_chunk_size  # of a device's row: prompt and response
  assert [tokens, piece] in shapes
  width = SETTINGS.network.hidden_size
  parts = {width, width // 8}
  assert not [sizes for sizes in shapes if 4096 in sizes and parts.isdisjoint(sizes)]


@pytest.mark.plan
def test_temporaries_follow_tokens_and_saved_residuals():
  """Twice the rows: about twice the activations. Four more layers: four more layer inputs."""

  def temporaries(**changes):
    return compiled(**changes).memory_analysis().temp_size_in_bytes

  base, double = (
    temporaries(ppo__micro_batch_size=16),
    temporaries(ppo__micro_batch_size=32, ppo__minibatch_size=32, ppo__rollout_batch_size=32),
  )
  assert 1.2 < double / base <= 2.05
  deep = dataclasses.replace(SETTINGS.network, num_hidden_layers=6)
  grown = temporaries(network=deep, ppo__micro_batch_size=16) - base
  residual = 2 * 80 * 32 * 4  # bytes: rows per device, tokens, width, float32
  weights = 4 * 4 * (2 * 32 * 48 + 48 * 32 * 3) // 8  # of four layers, split
  # Gradients of the new layers, and their weights as they are gathered and scattered.
  assert grown < 4 * residual * 1.5 + 4 * weights


@pytest.mark.plan
def test_stacked_weights_are_gathered_layer_by_layer():
  layers = 2
  for line in compiled().as_text().splitlines():
    if match := re.search(r'= f32\[([\d,]+)\]\S* all-gather', line):
      sizes = [int(n) for n in match[1].split(',')]
      assert not (sizes[0] == layers and sizes[1:] in ([32, 48], [48, 32], [32, 32])), line


@pytest.mark.plan
def test_command_line(tmp_path):
  """Exit code and JSON output, and the one-line error of a wrong topology."""
  command_line = [
    *(sys.executable, 'tools/plan.py', '--config=configs/ppo.py:local', f'--plans={tmp_path}'),
    *('--config.network.vocab_size=128', '--config.ppo.rollout_batch_size=8'),
    *('--config.ppo.minibatch_size=8', '--config.data.max_prompt_length=16', '--json'),
    *('--config.rollout.max_new_tokens=16', '--phases=critic update'),
  ]
  run = functools.partial(subprocess.run, capture_output=True, text=True)
  done = run([*command_line, '--topology=cpu:2'])
  assert done.returncode == 0, done.stderr
  record = json.loads(done.stdout.splitlines()[-1])
  assert record['fits'] and record['devices'] == 2 and record['phases'][0]['peak'] > 0
  wrong = run([*command_line, '--topology=v9:1'])
  assert wrong.returncode == 1 and "topology 'v9:1' does not exist" in wrong.stderr
