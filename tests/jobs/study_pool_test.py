"""The pool that runs a study: order, failures, what is finished, several processes at once."""

import sys

import pytest

from segjax.config.settings import Settings
from segjax.jobs import study_pool
from segjax.jobs.study_graph import Node


@pytest.fixture
def commands(monkeypatch):
  """The code that each run executes, by its name; without any it succeeds."""
  codes = {}
  monkeypatch.setattr(
    study_pool, 'command', lambda node: [sys.executable, '-S', '-c', codes.get(node.name, '')]
  )
  return codes


def _nodes(tmp_path):
  """Two bases with two cells each."""
  nodes = []
  for seed in (0, 1):
    base = Node('base', f'base {seed}', tmp_path / f'base{seed}', Settings())
    cells = [
      Node('cell', f'cell {seed} {arm}', tmp_path / f'cell{seed}{arm}', Settings(), (base,))
      for arm in 'ab'
    ]
    nodes += [base, *cells]
  return nodes


@pytest.mark.parametrize('jobs', [1, 3])
def test_a_failure_stops_those_that_need_it_alone(tmp_path, commands, jobs):
  commands['base 1'] = "print('a line'); raise SystemExit('segjax: config.x=1 is wrong.')"
  nodes, ended = _nodes(tmp_path), []
  outcome = study_pool.run_all(nodes, jobs, lambda node, _: ended.append(node.name))
  assert sorted(ended) == sorted(node.name for node in nodes)
  for node in nodes:
    position = ended.index(node.name)
    assert all(ended.index(need.name) < position for need in node.needs)
  errors = {node.name: outcome[node.directory] for node in nodes}
  wrong = 'base 1: config.x=1 is wrong. (exit code 1)'
  assert errors == dict.fromkeys(errors, '') | dict.fromkeys(
    ('base 1', 'cell 1 a', 'cell 1 b'), wrong
  )


def test_what_is_finished_is_not_run_again_and_what_failed_is(tmp_path, commands):
  marks = tmp_path / 'marks'
  nodes = _nodes(tmp_path)[:2]
  for node in nodes:
    commands[node.name] = f"open({str(marks)!r}, 'a').write({node.name + ';'!r})"
  commands['cell 0 a'] += '; raise SystemExit(3)'
  assert 'exit code 3' in study_pool.run_all(nodes, 1, lambda *_: None)[nodes[1].directory]
  commands['cell 0 a'] = (
    commands['cell 0 a'].partition(';  ')[0].replace('raise SystemExit(3)', '1')
  )
  assert study_pool.run_all(nodes, 1, lambda *_: None)[nodes[1].directory] == ''
  assert marks.read_text() == 'base 0;cell 0 a;cell 0 a;'
  assert (nodes[0].directory / 'config.py').exists()


def test_as_many_run_at_once_as_are_allowed(tmp_path, commands, monkeypatch):
  nodes = [Node('base', f'base {i}', tmp_path / f'{i}', Settings()) for i in range(4)]
  most, start = [], study_pool._start
  alive = []

  def counting(node):
    process = start(node)
    alive.append(process)
    most.append(sum(p.returncode is None for p in alive))
    return process

  monkeypatch.setattr(study_pool, '_start', counting)
  study_pool.run_all(nodes, 2, lambda *_: None)
  assert max(most) == 2 and len(most) == 4


def test_an_error_stops_the_runs_that_are_left(tmp_path, commands, monkeypatch):
  processes, start = [], study_pool._start
  monkeypatch.setattr(
    study_pool, '_start', lambda node: processes.append(start(node)) or processes[-1]
  )
  nodes = [Node('base', f'base {i}', tmp_path / f'{i}', Settings()) for i in range(2)]
  commands['base 1'] = 'import time; time.sleep(60)'

  def interrupt(*_):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    study_pool.run_all(nodes, 2, interrupt)
  assert [process.returncode for process in processes] == [0, -15]
