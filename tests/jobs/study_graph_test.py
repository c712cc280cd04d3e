"""The runs of a study: what arms share, how a run is identified, what its config holds."""

import json
import runpy

import numpy as np
import pytest

from configs import study as config
from segjax.config import parse
from segjax.config.settings import replace
from segjax.config.study_arms import parse_arms
from segjax.errors import UserError
from segjax.jobs import study_cells, study_plan, study_tuning
from segjax.jobs.study_graph import Graph, run_values
from segjax.model.mesh import make_mesh
from segjax.run.stage import Stage

LINES = (
  'segment',
  'token reward.segmentation.granularity=token',
  'scalar normalizer.kind=scalar',
  'end_only reward_shaping.spread=end_only',
  'gold reward_shaping.reward_fn={gold} reward_shaping.reward_model_weight=0',
  'best stages=evaluate evaluate.samples_per_prompt=8',
)


@pytest.fixture(scope='module')
def settings():
  return parse.from_config(config.get_config())


@pytest.fixture
def cells(settings, tmp_path):
  """A function that returns the cells of a seed by the names of the arms."""
  graph = Graph(settings, tmp_path)

  def make(seed=0, **constants):
    return {arm.name: graph.cell(arm, 'requests', seed, constants) for arm in parse_arms(LINES)}

  return make


def _kinds(cell):
  return [node.kind for node in cell.nodes]


def test_arms_share_what_their_settings_do_not_change(cells):
  made = cells()
  everything = ['base', 'reward', 'normalizer', 'cell']
  assert {name: _kinds(cell) for name, cell in made.items()} == dict.fromkeys(made, everything) | {
    'gold': ['base', 'cell']
  }
  nodes = {name: cell.nodes for name, cell in made.items()}
  assert len({n[0] for n in nodes.values()}) == 1
  with_model = {name: n for name, n in nodes.items() if name != 'gold'}
  # The token arm has a reward model of its own, the scalar one a normaliser of its own.
  assert len({n[1] for n in with_model.values()}) == 2
  assert nodes['scalar'][1] is nodes['segment'][1] and nodes['token'][1] is not nodes['segment'][1]
  assert nodes['scalar'][2] is not nodes['segment'][2]
  assert nodes['end_only'][2] is nodes['segment'][2] is nodes['best'][2]
  assert len({n[-1] for n in nodes.values()}) == len(made)


def test_constants_change_the_cell_alone_and_seeds_everything(cells):
  first, other = cells(), cells(**{'ppo.kl_coef': 0.5})
  for name, cell in first.items():
    assert cell.base is other[name].base
    # Evaluation reads config.ppo too, so that the best of n is another cell as well.
    assert cell.node.directory != other[name].node.directory
  second = cells(seed=1)
  assert not {n for c in first.values() for n in c.nodes} & {
    n for c in second.values() for n in c.nodes
  }


def test_what_an_arm_sets_is_not_tuned(settings, tmp_path):
  (arm,) = parse_arms(('gentle ppo.kl_coef=1.0',))
  cell = Graph(settings, tmp_path).cell(
    arm, 'requests', 0, {'ppo.kl_coef': 0.1, 'ppo.clip_eps': 0.3}
  )
  assert (cell.node.settings.ppo.kl_coef, cell.node.settings.ppo.clip_eps) == (1.0, 0.3)


def test_hashes_do_not_depend_on_where_runs_lie_or_how_many_run_at_once(settings, tmp_path, cells):
  arm = parse_arms(LINES)[0]
  elsewhere = Graph(replace(settings, **{'study.jobs': 7}), tmp_path / 'elsewhere')
  moved = elsewhere.cell(arm, 'requests', 0).node
  assert moved.directory.name == cells()['segment'].node.directory.name


@pytest.mark.parametrize('name', ['segment', 'gold'])
def test_a_config_file_holds_the_settings_of_its_run(cells, name):
  for node in cells()[name].nodes:
    if node.kind == 'normalizer':
      model = node.needs[-1].directory / 'reward' / 'model'
      model.mkdir(parents=True)
      (model / 'segment_reward.json').write_text('{}')
    node.prepare()
    loaded = parse.from_config(runpy.run_path(str(node.config_file))['get_config']())
    values = run_values(node.settings)
    assert {key: value for key, value in parse.changed_values(loaded).items()} == values
    assert loaded.seed == 0 and loaded.stages == node.settings.stages
  cell = cells()[name]
  assert (name == 'gold') == (node.settings.reward_model.path == '')
  assert node.settings.policy.path == str(cell.base.directory / 'sft' / 'model')


def test_the_normaliser_writes_into_a_copy(cells):
  node = cells()['segment'].nodes[2]
  model = node.needs[-1].directory / 'reward' / 'model'
  model.mkdir(parents=True)
  (model / 'segment_reward.json').write_text('before')
  node.prepare()
  copy = node.directory / 'reward_model' / 'segment_reward.json'
  assert str(copy.parent) == node.settings.reward_model.path
  copy.write_text('fitted')
  node.prepare()  # as after an interruption
  assert copy.read_text() == 'fitted' and (model / copy.name).read_text() == 'before'


@pytest.mark.parametrize(
  'line, message',
  [
    ('bad reward.segmentation.granularity=bandit normalizer.kind=last', "arm 'bad': .* use scalar"),
    ('bad ppo.kl_coef=much', "arm 'bad': config.ppo.kl_coef='much' must be of type float"),
    ('bad reward_shaping.reward_fn=no_module:f', 'cannot be loaded'),
    ('same reward_shaping.spread=auto', "'segment' and 'same' have the same settings"),
  ],
)
def test_arms_that_cannot_run_stop_the_study_before_it_starts(tmp_path, line, message):
  values = config.get_config()
  values.study.arms = ('segment', line)
  stage = Stage('study', parse.from_config(values), tmp_path / 'study', make_mesh())
  with pytest.raises(UserError, match=message):
    study_plan.load(stage)


def test_a_directory_of_another_study_is_refused(settings, tmp_path):
  def load(**changes):
    s = replace(settings, **{key.replace('__', '.'): value for key, value in changes.items()})
    plan = study_plan.load(Stage('study', s, tmp_path / 'study', make_mesh()))
    study_plan.write_identity(tmp_path, plan.settings, plan.arms)
    return plan

  assert len(load(study__only=('segment', 'token'), study__seeds=('0:2',)).cells({})) == 6
  more = load(study__seeds=('0:3',))  # more seeds and more arms go on with it
  assert len(more.cells({})) == 4 * len(settings.study.arms)
  with pytest.raises(UserError, match=r'holds another study: ppo\.kl_coef differ'):
    load(ppo__kl_coef=0.2)
  with pytest.raises(UserError, match='holds another study: baseline differ'):
    load(study__baseline='token')
  with pytest.raises(UserError, match='another study: arm token differ'):
    load(study__arms=('segment', 'token reward.segmentation.granularity=bandit'))


def test_constants_are_chosen_by_the_mean_over_seeds(tmp_path):
  trials = [{'ppo.kl_coef': 0.1}, {'ppo.kl_coef': 0.2}, {'ppo.kl_coef': 0.3}]
  areas = [[0.1, 0.4], [0.2, 0.35], [0.9, None]]  # the last one has a run that failed
  records = {
    ('requests', 'segment', number): [{} if area is None else {'area': area} for area in group]
    for number, group in enumerate(areas)
  }
  tuned = study_tuning.choose(trials, records)
  entry = tuned['requests']['segment']
  assert entry['choice'] == {'ppo.kl_coef': 0.2}
  assert [trial['mean'] for trial in entry['trials']] == [
    pytest.approx(0.25),
    pytest.approx(0.275),
    None,
  ]
  study_tuning.write(tmp_path / 'tuning.json', [100, 101], tuned)
  assert json.loads((tmp_path / 'tuning.json').read_text())['seeds'] == [100, 101]
  segment, token, *_, best = parse_arms(LINES)
  path = tmp_path / 'tuning.json'
  assert study_tuning.read(path, [segment, best], ['requests']) == {
    ('requests', 'segment'): {'ppo.kl_coef': 0.2}
  }
  with pytest.raises(UserError, match="no choice for arm 'token' on 'requests'"):
    study_tuning.read(path, [token], ['requests'])


def test_a_run_has_diverged_only_if_it_fell_beyond_chance():
  before = np.linspace(-1, 1, 20)
  noise = 0.1 * np.cos(np.arange(20))
  assert study_cells.has_lost(before, before + noise - 0.2)
  assert not study_cells.has_lost(before, before + noise - 0.01)
  assert not study_cells.has_lost(before, before + 0.5)
