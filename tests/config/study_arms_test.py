"""Arms, seeds and trials of a study, and the one line for each wrong one."""

import collections
import dataclasses

import pytest

from configs.shared import study_arms as shipped
from segjax.config import study_arms
from segjax.config.settings import Settings, Study, replace
from segjax.errors import UserError

STUDY = Study(
  arms=('a', 'b ppo.kl_coef=1e-1 ppo.whiten=False', 'gold reward_shaping.reward_fn={gold}')
)


def test_a_line_is_an_arm():
  a, b, gold = study_arms.parse_arms(STUDY.arms)
  assert (a.name, a.overrides, a.stages) == ('a', {}, ('ppo', 'evaluate'))
  assert b.overrides == {'ppo.kl_coef': 0.1, 'ppo.whiten': False}
  settings = replace(
    Settings(), **{'evaluate.gold_reward_fn': 'm:gold', 'evaluate.boundary_fn': 'm:e'}
  )
  assert study_arms.resolve(gold.overrides, settings) == {'reward_shaping.reward_fn': 'm:gold'}
  values = {'a.b': '{boundary}', 'c': 1.0, 'd': 'text'}
  assert study_arms.resolve(values, settings) == {'a.b': 'm:e', 'c': 1.0, 'd': 'text'}
  (best,) = study_arms.parse_arms(('best_of_n stages=evaluate evaluate.samples_per_prompt=64',))
  assert best.stages == ('evaluate',) and best.is_yardstick and not best.is_trained


@pytest.mark.parametrize('name', shipped.ARMS)
def test_shipped_arms_begin_with_a_method(name):
  arms = study_arms.select_arms(Study(arms=shipped.ARMS[name]))
  assert arms[0].name == shipped.ARMS[name][0].split()[0]
  assert len({arm.name for arm in arms}) == len(shipped.ARMS[name])


def test_the_baseline_comes_first_and_is_never_left_out():
  chosen = study_arms.select_arms(dataclasses.replace(STUDY, only=('a',), baseline='b'))
  assert [arm.name for arm in chosen] == ['b', 'a']


@pytest.mark.parametrize(
  'values, seeds', [(('0:2',), [0, 1, 2]), (('0', '5', '7:8'), [0, 5, 7, 8]), (('3',), [3])]
)
def test_seeds(values, seeds):
  assert study_arms.parse_seeds(values, 'seeds') == seeds


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'arms': ('a', 'a ppo.gamma=0.9')}, "has 'a' twice"),
    ({'arms': ('a', 'b ppo.kl_cof=1')}, 'b: config.ppo.kl_cof does not exist; did you mean'),
    ({'arms': ('a', 'b ppo.kl_coef')}, "'ppo.kl_coef' has no value; write KEY=VALUE"),
    ({'arms': ('a', 'b seed=1')}, 'seed is set by the study itself'),
    ({'arms': ('a', 'b study.jobs=2')}, 'set by the study itself'),
    ({'arms': ('a', 'b stages=sft')}, 'must be ppo.evaluate, or evaluate alone'),
    ({'arms': ('a',)}, 'leaves 1 arm'),
    ({'only': ('c',)}, "config.study.only='c' is not one of a, b, gold"),
    ({'baseline': 'c'}, "config.study.baseline='c' is not one of"),
    ({'seeds': ('0', '1')}, r'are 2 seed\(s\), and an interval over seeds needs 3'),
    ({'seeds': ('98:100',)}, 'seeds from 100 on are those of tuning'),
    ({'seeds': ('0:2', '1')}, 'names a seed twice'),
    ({'seeds': ('five',)}, "config.study.seeds='five' is no seed"),
    ({'seeds': ('2:0',)}, 'names no seed'),
    ({'trials': 1, 'grid': ('ppo.kl_coef=1|2',), 'tuning_seeds': ('99',)}, 'seeds below 100'),
    ({'trials': 1}, 'without a config.study.grid'),
    ({'trials': 1, 'grid': ('ppo.kl_coef=1',), 'tuning_file': 'x'}, 'both choose constants'),
    ({'languages': ('latin',)}, "config.study.languages='latin' is not one of describe"),
    ({'main_level': '5'}, "config.study.main_level='5' is not one of 4, 8, 12"),
    ({'kl_levels': ('8', '-1')}, 'must be positive numbers'),
    ({'kl_levels': ('8', 'x')}, 'must be positive numbers'),
  ],
)
def test_wrong_studies_are_refused_in_one_line(changes, message):
  study = dataclasses.replace(STUDY, **changes)
  with pytest.raises(UserError, match=message):
    study_arms.check_study(study)
    study_arms.select_arms(study)


def test_all_arms_try_the_same_points_of_the_grid():
  grid = ('ppo.kl_coef=0.1|0.2|0.3', 'ppo.clip_eps=0.1|0.2')
  everything = study_arms.tuning_trials(Study(grid=grid, trials=9))
  assert len(everything) == 6
  assert everything[1] == {'ppo.kl_coef': 0.1, 'ppo.clip_eps': 0.2}
  some = study_arms.tuning_trials(Study(grid=grid, trials=4))
  assert len(some) == 4 and all(point in everything for point in some)
  assert some == study_arms.tuning_trials(Study(grid=grid, trials=4))
  for key, size in (('ppo.kl_coef', 3), ('ppo.clip_eps', 2)):
    counts = collections.Counter(point[key] for point in some)
    assert len(counts) == size and max(counts.values()) - min(counts.values()) <= 1
  assert study_arms.tuning_trials(Study()) == []


def test_an_arm_takes_some_of_the_rewards():
  lines = ('a path=x weight=0.5', 'b fn=m:f', 'c fn=m:g')
  settings = replace(Settings(), rewards=lines)
  both, none = study_arms.parse_arms(('both rewards=c+a', 'none rewards=none'))
  assert study_arms.resolve(both.overrides, settings) == {'rewards': (lines[2], lines[0])}
  assert study_arms.resolve(none.overrides, settings) == {'rewards': ()}
  with pytest.raises(UserError, match="rewards='d' is not one of a, b, c, none"):
    study_arms.resolve({'rewards': 'd'}, settings)
