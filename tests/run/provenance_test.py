"""The record, curves and card that a run writes next to a model."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import pytest

import segjax
from segjax.report import charts
from segjax.run import provenance
from segjax.run.stage import Command


class _Rows:
  """The attributes of a dataset that a card reads."""

  counts = {'rows': 9}  # noqa: RUF012

  def __len__(self):
    return 7


@pytest.fixture
def stage(make_stage, small):
  values = small('sft', **{'data.path': 'owner/rows', 'policy.path': 'owner/base', 'seed': 5})
  stage = make_stage('sft', values)
  stage.directory.mkdir(parents=True)
  (stage.directory / 'metrics.jsonl').write_text('{"step": 0, "loss": 1.5}\n')
  return dataclasses.replace(stage, command=Command('configs/sft.py:local', 'python -m segjax ...'))


def test_the_record_describes_the_run(stage):
  card = provenance.card(stage, {'loss': 1.5, 'entropy': None}, _Rows(), ['loss'])
  record = json.loads(json.dumps(card.record))
  assert (record['stage'], record['recipe'], record['seed']) == ('sft', 'configs/sft.py:local', 5)
  assert record['command'] == 'python -m segjax ...'
  assert record['data'] == {
    **{'path': 'owner/rows', 'split': 'train', 'rows': 9, 'used': 7, 'hub': 'owner/rows'}
  }
  assert record['models'] == {'policy': 'owner/base'}
  assert record['metrics'] == card.metrics == {'loss': 1.5}
  assert record['settings'] == json.loads(json.dumps(dataclasses.asdict(stage.settings)))
  packages = {'segjax', 'jax', 'flax', 'transformers', 'optax', 'orbax-checkpoint'}
  assert packages <= set(record['versions'])
  assert record['versions']['jax'] == jax.__version__
  assert record['devices'] == {'kind': 'cpu', 'count': 1, 'processes': 1}
  assert card.curves.startswith(b'\x89PNG')
  assert provenance.card(stage, {'loss': 1.5}, _Rows(), ['loss']) == card


def test_non_finite_metrics_are_strings(stage):
  record = provenance.card(stage, {'loss': float('nan')}, _Rows(), []).record
  assert record['metrics'] == {'loss': 'nan'}
  json.dumps(record, allow_nan=False)


def test_failed_curves_do_not_stop_the_export(stage, monkeypatch, capsys):
  def fail(*_):
    raise RuntimeError('no fonts')

  monkeypatch.setattr(charts, 'card_png', fail)
  assert provenance.card(stage, {}, _Rows(), ['loss']).curves == b''
  assert "no curves for the model card: RuntimeError('no fonts')" in capsys.readouterr().out


def _git(directory, *arguments):
  names = ['-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false']
  environment = {k: v for k, v in os.environ.items() if not k.startswith('GIT_')}
  done = subprocess.run(
    ['git', '-C', str(directory), *names, *arguments],
    capture_output=True, text=True, check=True, env=environment,
  )  # fmt: skip
  return done.stdout.strip()


def test_commit_is_that_of_the_checkout_only(tmp_path):
  package = tmp_path / 'segjax'
  package.mkdir()
  (package / '__init__.py').write_text('')
  assert provenance.commit(package) == ''  # no repository
  _git(tmp_path, 'init', '-q')
  assert provenance.commit(package) == ''  # no commit yet
  _git(tmp_path, 'add', '.')
  _git(tmp_path, 'commit', '-qm', 'x')
  _git(tmp_path, 'tag', '-am', 'x', 'v1')  # a tag is not a commit
  head = _git(tmp_path, 'rev-parse', 'HEAD')
  assert provenance.commit(package) == head
  (tmp_path / 'notes').write_text('')  # not tracked
  assert provenance.commit(package) == head
  (package / '__init__.py').write_text('# changed')
  assert provenance.commit(package) == f'{head}-dirty'
  installed = tmp_path / 'venv' / 'site-packages' / 'segjax'
  installed.mkdir(parents=True)
  assert provenance.commit(installed) == ''  # inside a repository of another project


def test_commit_without_git(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  assert provenance.commit() == ''


def test_version_is_that_of_setup():
  setup = (Path(segjax.__file__).parents[1] / 'setup.py').read_text()
  assert segjax.__version__ == 'unknown' or f"version='{segjax.__version__}'" in setup
