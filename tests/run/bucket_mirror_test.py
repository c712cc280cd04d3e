"""A working directory on a bucket: the local copy equals it, and the bucket alone is enough."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from segjax.run import bucket_mirror, lock, stage_record

REPOSITORY = Path(__file__).resolve().parents[2]
URL = 'memory://bucket/run'


class Killed(BaseException):
  """As kill -9: nothing after it is done."""


@pytest.fixture
def files():
  """The bucket, in memory."""
  found = fsspec.filesystem('memory')
  found.store.clear()
  found.pseudo_dirs[:] = ['']
  yield found
  found.store.clear()


@pytest.fixture
def copy(tmp_path):
  """A mirror in a directory of its own, by name."""

  def make(name='a', **more):
    (tmp_path / name).mkdir(exist_ok=True)
    return bucket_mirror.BucketMirror(URL, tmp_path / name, **({'max_misses': 0} | more))

  return make


def _tree(directory):
  return {
    path.relative_to(directory).as_posix(): path.read_text()
    for path in directory.rglob('*')
    if path.is_file()
  }


def _fill(directory, texts):
  for name, text in texts.items():
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def test_another_machine_gets_what_was_pushed(files, copy, tmp_path):
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '{}', 'sft/model/w': 'x' * 9, 'config.json': ''})
  _fill(tmp_path / 'a', {'sft/checkpoints/1/w': 'state', 'lock.json': '', 'sft/w.partial': 'half'})
  copy('a').push()
  _fill(tmp_path / 'b', {'sft/metrics.jsonl': 'stale', 'sft/model/gone': 'stale'})
  copy('b').pull()
  assert _tree(tmp_path / 'b') == {
    'sft/metrics.jsonl': '{}',
    'sft/model/w': 'x' * 9,
    'config.json': '',
  }


def test_only_what_changed_is_written(files, copy, tmp_path, monkeypatch):
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '1', 'sft/model/w': 'x'})
  here = copy('a')
  here.push()
  written = []
  put = type(files).put_file
  monkeypatch.setattr(
    type(files), 'put_file', lambda self, a, b, **k: written.append(b) or put(self, a, b, **k)
  )
  here.push()
  assert written == []
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '12'})
  here.push()
  assert [path.rpartition('/')[2] for path in written] == ['metrics.jsonl']
  again = copy('a')
  again.pull()
  again.push()
  assert len(written) == 1


def _writes(files, monkeypatch, limit):
  """Lets so many writes and deletions through, then the process is gone."""
  left = [limit]

  def limited(name):
    real = getattr(type(files), name)

    def call(self, *args, **kwargs):
      if not left[0]:
        raise Killed
      left[0] -= 1
      return real(self, *args, **kwargs)

    monkeypatch.setattr(type(files), name, call)

  for name in ('put_file', 'pipe_file', 'rm_file'):
    limited(name)


_OUTPUTS = {'model': 'sum of model'}


def _runs_on(directory, key):
  """What the command with this key would find: 'finished', its metrics to go on with, or None."""
  stage = directory / 'sft'
  stage_record.restore_old(stage, key)
  model = stage / 'model' / 'w'
  outputs = {'model': f'sum of {model.read_text()}'} if model.exists() else {}
  if stage_record.load_results_if_valid(stage, key, outputs) is not None:
    return 'finished'
  stage_record.prepare_directory(stage, key)
  metrics = stage / 'metrics.jsonl'
  return metrics.read_text() if metrics.exists() else None


@pytest.mark.parametrize('limit', range(9))
def test_killed_while_a_stage_is_declared_finished(files, copy, tmp_path, monkeypatch, limit):
  """It is finished with all it made, or in its middle with all its metrics."""
  stage, key, here = tmp_path / 'a' / 'sft', {'seed': 0}, copy('a')
  stage_record.prepare_directory(stage, key)
  _fill(stage, {'metrics.jsonl': '1'})
  here.push()
  _fill(stage, {'metrics.jsonl': '12', 'model/w': 'model', 'model/v': ''})
  stage_record.record_results(stage, key, {'loss': 1}, _OUTPUTS)
  with monkeypatch.context() as patch:
    _writes(files, patch, limit)
    is_cut = False
    try:
      here.push()
    except Killed:
      is_cut = True
  copy('b').pull()
  assert is_cut == (limit < 6)
  assert _runs_on(tmp_path / 'b', key) in (('1', '12', 'finished') if is_cut else ('finished',))


@pytest.mark.parametrize('limit', range(16))
def test_killed_while_two_runs_change_places(files, copy, tmp_path, monkeypatch, limit):
  """The settings of before come back: what they made is there, whenever the push is cut off."""
  stage, here = tmp_path / 'a' / 'sft', copy('a')
  first, second = {'seed': 0}, {'seed': 1}
  stage_record.prepare_directory(stage, first)
  _fill(stage, {'metrics.jsonl': 'first'})
  here.push()
  assert stage_record.prepare_directory(stage, second) == 'seed changed'
  _fill(stage, {'metrics.jsonl': 'second', 'model/w': 'other'})
  here.push()
  stage_record.restore_old(stage, first)
  stage_record.prepare_directory(stage, first)
  with monkeypatch.context() as patch:
    _writes(files, patch, limit)
    is_cut = False
    try:
      here.push()
    except Killed:
      is_cut = True
  assert is_cut == (limit < 10)
  copy('b').pull()
  assert _runs_on(tmp_path / 'b', first) == 'first'
  if not is_cut:
    assert _tree(tmp_path / 'b') == _tree(tmp_path / 'a')


def test_a_bucket_out_of_reach_is_tried_again(files, copy, tmp_path, monkeypatch):
  said = []
  here = copy('a', max_misses=2, say=said.append)
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '1'})

  def refuse(*_, **__):
    raise ConnectionError('no route\nto host')

  with monkeypatch.context() as patch:
    patch.setattr(type(files), 'put_file', refuse)
    assert not here.offer() and not here.offer()
    assert said == [f'warning: {URL} could not be written: no route; tried again'] * 2
    with pytest.raises(OSError, match=r'no route\. Start the same command again'):
      here.offer()
  assert here.offer()
  copy('b').pull()
  assert _tree(tmp_path / 'b') == {'sft/metrics.jsonl': '1'}


@pytest.mark.parametrize(
  'url, message',
  [
    ('nosuch://b/run', '--workdir=nosuch://b/run cannot be read: Protocol not known: nosuch'),
    ('gs://b/run', r"--workdir=gs://b/run cannot be read: .*gcsfs.*\(pip install -e '.\[gcs\]'\)"),
  ],
)
def test_a_bucket_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, url, message):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(ValueError, match=message):
    bucket_mirror.BucketMirror(url, tmp_path, 0)


def test_states_of_replaced_settings_are_removed(files, copy, tmp_path):
  """Those of this key and of the one before stay."""
  stage, here, seen = tmp_path / 'a' / 'sft', copy('a'), []
  for seed in range(3):
    stage_record.prepare_directory(stage, {'seed': seed})
    _fill(stage, {'metrics.jsonl': f'{seed}'})
    seen.append(bucket_mirror._fingerprint(stage))
    files.pipe_file(f'/bucket/run/{bucket_mirror.STATES}/sft/{seen[-1]}/1/state', b'')
    here.publish(stage)
  left = files.ls(f'/bucket/run/{bucket_mirror.STATES}/sft', detail=False)
  assert sorted(path.rpartition('/')[2] for path in left) == sorted(seen[1:])


def test_where_states_cannot_go_is_told_first(files, copy, tmp_path):
  refused = pytest.raises(ValueError, match='training states cannot go there; give gs://')
  with refused, copy('a').held(tmp_path):
    pass


@pytest.fixture
def quick(monkeypatch):
  """A lock whose heart beats fast."""
  for name, seconds in {'_BEAT': 0.05, '_PATIENCE': 0.5, '_SETTLE': 0.05}.items():
    monkeypatch.setattr(lock, name, seconds)


PATH = '/bucket/run/lock.json'


def test_a_live_lock_is_refused_and_let_go(files, quick):
  with lock.lock_bucket(files, PATH, URL):
    refused = pytest.raises(lock.LockedError, match=rf'{URL} is in use by process {os.getpid()} on')
    with refused, lock.lock_bucket(files, PATH, URL):
      pass
  assert not files.exists(PATH)
  with lock.lock_bucket(files, PATH, URL):
    pass


@pytest.mark.parametrize(
  'sign, is_waited_for',
  [
    ({'pid': 1, 'host': 'elsewhere', 'run': 'x'}, True),
    ({'pid': 2**30, 'run': 'x'}, False),
  ],
)
def test_a_lock_that_stands_still_is_taken_over(files, quick, sign, is_waited_for):
  here = {'host': socket.gethostname(), 'machine': lock._machine()}
  files.pipe_file(PATH, json.dumps(here | sign).encode())
  begun = time.monotonic()
  with lock.lock_bucket(files, PATH, URL):
    assert (time.monotonic() - begun > lock._PATIENCE) == is_waited_for
    assert json.loads(files.cat_file(PATH))['pid'] == os.getpid()


def test_of_two_that_begin_at_once_one_goes_on(files, quick):
  came = []

  def begin():
    try:
      with lock.lock_bucket(files, PATH, URL):
        came.append('in')
        time.sleep(0.3)
    except lock.LockedError:
      came.append('refused')

  threads = [threading.Thread(target=begin) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(came) == ['in', 'refused']


_SMALL = {
  'demo.sft_rows': 64,
  'demo.pairs': 64,
  'network.max_position_embeddings': 64,
  'sft.max_steps': 6,
  'sft.batch_size': 8,
  'checkpoint.every_steps': 1,
}


def _start(buckets, run, local, *more):
  """A run on gs://bucket/`run`, which is a directory in `buckets`."""
  (buckets / 'bucket').mkdir(parents=True, exist_ok=True)
  flags = [f'--config.{key}={value}' for key, value in _SMALL.items()]
  command = [sys.executable, '-m', 'segjax.main', '--config=configs/ppo.py', *flags]
  path = os.pathsep.join([str(REPOSITORY / 'tests' / 'bucket'), str(REPOSITORY)])
  return subprocess.Popen(
    [
      *command,
      f'--workdir=gs://bucket/{run}',
      f'--local_copy={local}',
      '--config.stages=demo,sft',
      *more,
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=REPOSITORY,
    env=os.environ
    | {
      'FAKE_BUCKETS': str(buckets),
      'PYTHONPATH': path,
      'XLA_FLAGS': '--xla_backend_optimization_level=0',
    },
  )


def _end(process):
  out, _ = process.communicate(timeout=240)
  return process.returncode, out


def _saved(run):
  return [int(p.parent.name) for p in run.glob('checkpoints/sft/*/[0-9]*/commit_success.txt')]


def _timeless(run):
  lines = map(json.loads, (run / 'sft' / 'metrics.jsonl').read_text().splitlines())
  return [
    {k: v for k, v in line.items() if not k.startswith(('timing/', 'perf/'))} for line in lines
  ]


@pytest.mark.slow
def test_the_bucket_alone_is_enough_after_a_kill(tmp_path):
  """Kill -9, all local files gone, another machine: the same bits."""
  buckets, local = tmp_path / 'buckets', tmp_path / 'local'
  code, out = _end(_start(buckets, 'whole', local))
  assert code == 0, out[-3000:]
  process, run = _start(buckets, 'killed', local), buckets / 'bucket' / 'killed'
  while max(_saved(run), default=0) < 3 and process.poll() is None:
    time.sleep(0.02)
  process.kill()
  process.communicate()
  step = max(_saved(run))
  assert 3 <= step < 6
  shutil.rmtree(local)
  code, out = _end(_start(buckets, 'killed', tmp_path / 'another'))
  assert code == 0, out[-3000:]
  assert f'resuming from step {step} of 6' in out and 'demo        reused' in out
  whole = buckets / 'bucket' / 'whole'
  for name in ('demo/model/model.safetensors', 'sft/model/model.safetensors'):
    assert (run / name).read_bytes() == (whole / name).read_bytes()
  assert _timeless(run) == _timeless(whole)
  assert [line['step'] for line in _timeless(run)] == [0, 1, 2, 3, 4, 5]
  assert not _saved(run) and not (run / lock.FILE).exists()
  code, out = _end(_start(buckets, 'killed', tmp_path / 'third'))
  assert code == 0 and 'sft         reused' in out


@pytest.mark.slow
def test_two_processes_work_on_one_bucket(tmp_path):
  """Each in a copy of its own; what the run leaves there is that of one process."""
  buckets = tmp_path / 'buckets'
  code, out = _end(_start(buckets, 'one', tmp_path / 'one'))
  assert code == 0, out[-3000:]
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  flags = [f'--coordinator=localhost:{port}', '--num_processes=2']
  started = [
    _start(buckets, 'two', tmp_path / f'two{index}', *flags, f'--process_id={index}')
    for index in range(2)
  ]
  for process in started:
    code, out = _end(process)
    assert code == 0, out[-3000:]
  one, two = (
    [line['train/loss'] for line in _timeless(buckets / 'bucket' / run)] for run in ('one', 'two')
  )
  assert two == pytest.approx(one, rel=1e-5)
