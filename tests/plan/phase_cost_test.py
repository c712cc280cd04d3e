"""Costs of phases, and the step that they add up to."""

import dataclasses

import pytest

from segjax.model.chips import CHIPS, Rates
from segjax.plan import cli, planner, topologies
from segjax.plan.hlo_cost import Collectives, ProgramCost
from segjax.plan.phase_cost import PhaseCost, cost_of_call
from segjax.plan.phase_plan import PhasePlan
from segjax.plan.phases import JobPrograms, Phase
from segjax.plan.ppo_programs import PPO

CHIP = dataclasses.replace(
  CHIPS['cpu'], flops=100.0, bandwidth=10.0, rates=Rates(50.0, 25.0, 1.0, 5.0, 1.0)
)


def test_cost_of_calls():
  exchange = Collectives('all-gather', False, number=3, bytes=40, seconds=8.0)
  other = Collectives('all-reduce', True, number=1, bytes=2, seconds=2.0)
  cost = cost_of_call(ProgramCost(100.0, 50.0, 20, (exchange, other), exposed=4.0, seconds=9.0))
  assert cost == PhaseCost(1, 100.0, 50.0, 20, 42, 10.0, 4.0, 9.0)
  assert cost.hidden == pytest.approx(0.6)
  assert cost.times(2.5) == PhaseCost(2.5, 250.0, 125.0, 50, 105, 25.0, 10.0, 22.5)


@pytest.mark.parametrize(
  'sizes, bound',
  [
    # Attention at its own rate: 100 / 50 + 50 / 25 s; 39 / 10 s of memory.
    ({'flops': 150, 'attention_flops': 50, 'bytes': 39, 'exposed': 3.9}, 'arithmetic'),
    ({'flops': 150, 'attention_flops': 0, 'bytes': 39, 'exposed': 3.8}, 'memory'),
    ({'flops': 150, 'attention_flops': 50, 'bytes': 39, 'exposed': 4.1}, 'links'),
  ],
)
def test_what_binds_takes_most_of_the_time(sizes, bound):
  others = dict.fromkeys(('calls', 'exchanged', 'exchange_seconds', 'seconds'), 1)
  assert PhaseCost(**others, **sizes).bound(CHIP) == bound


def plan(*phases, existing=('decode', 'update', 'held-out')):
  topology = dataclasses.replace(topologies.parse('cpu:2'), chip=CHIP)
  calls = {'held-out': {'calls': None}}
  declared = [Phase(name, None, (), {}, (), (), **calls.get(name, {})) for name in existing]
  programs = JobPrograms({}, declared, {}, tokens=60)
  return planner.Plan(PPO, topology, programs, 'maximum', list(phases), 1, [])


def phase(name, seconds, **fields):
  cost = PhaseCost(*[0] * 7, seconds) if seconds else None
  return PhasePlan(name, 0, 0, 0, 0, 0, 0.0, cost=cost, **fields)


def test_a_step_is_the_sum_of_its_phases():
  decode, update = phase('decode', 2.0), phase('update', 4.0, model_flops=400)
  whole = plan(decode, update, phase('held-out', None))
  assert whole.step_seconds == 6 and whole.tokens_per_second == 10
  assert whole.update_mfu == pytest.approx(400 / 4 / 2 / 100)
  # Without a phase there is no time of a step, but the updates' share of the peak.
  assert plan(update).step_seconds is None and plan(update).update_mfu == whole.update_mfu
  refused = dataclasses.replace(decode, refused='too large')
  assert plan(refused, update, phase('held-out', None)).step_seconds is None
  assert plan(decode).update_mfu is None


def test_line_of_the_table():
  def record(name, peak, seconds):
    cost = {'seconds': seconds, 'bound': f'{name}s'}
    return {'name': name, 'peak': peak * 2**30, 'compile_seconds': 2.0, 'cost': cost}

  phases = [record('prefill', 3, 1.0), record('decode chunk', 4, 3.0), record('scoring', 2, 2.5)]
  figures = {'memory': 8 * 2**30, 'fits': False, 'phases': phases, 'seconds_per_step': 6.5}
  line = cli._line('ppo', figures | {'tokens_per_second': 1234.5, 'update_mfu': None})
  assert line == (
    '| `ppo` | 8.0, does NOT fit | 4.0 | 2.0 |  | 6 s | 4.0 s | 2.5 s |  | 6.5 s | '
    'decode chunks | 1,234 |  |'
  )
