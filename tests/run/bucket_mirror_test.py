"""A working directory on a bucket: the local copy equals it, and a run resumes from it alone."""

import contextlib
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
from fsspec.implementations.dirfs import DirFileSystem

from segjax.errors import UserError
from segjax.run import bucket_lock, bucket_mirror, lock, stage_record

REPOSITORY = Path(__file__).resolve().parents[2]
URL = 'memory://bucket/run'


class Killed(BaseException):
  """Simulates kill -9: no handler of `Exception` runs."""


@pytest.fixture
def files():
  """A file system in memory that contains the bucket."""
  memory = fsspec.filesystem('memory')
  memory.store.clear()
  memory.pseudo_dirs[:] = ['']
  yield memory
  memory.store.clear()


@pytest.fixture
def make_mirror(tmp_path):
  """Returns a function that makes a mirror of the bucket in the directory `name`."""

  def make(name, **arguments):
    (tmp_path / name).mkdir(exist_ok=True)
    defaults = {'max_failures': 0, 'log_fn': print}
    return bucket_mirror.BucketMirror(URL, tmp_path / name, **(defaults | arguments))

  return make


def _tree(directory):
  return {
    path.relative_to(directory).as_posix(): path.read_text()
    for path in directory.rglob('*')
    if path.is_file() and path.name != bucket_mirror._INDEX
  }


def _fill(directory, texts):
  for name, text in texts.items():
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def test_another_machine_gets_what_was_pushed(files, make_mirror, tmp_path):
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '{}', 'sft/model/w': 'x' * 9, 'config.json': ''})
  _fill(tmp_path / 'a', {'sft/checkpoints/1/w': 'state', 'lock.json': '', 'sft/w.partial': 'half'})
  make_mirror('a').push()
  _fill(tmp_path / 'b', {'sft/metrics.jsonl': 'stale', 'sft/model/gone': 'stale'})
  make_mirror('b').pull()
  assert _tree(tmp_path / 'b') == {
    'sft/metrics.jsonl': '{}',
    'sft/model/w': 'x' * 9,
    'config.json': '',
  }


def test_only_what_changed_is_written(files, make_mirror, tmp_path, monkeypatch):
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '1', 'sft/model/w': 'x'})
  mirror = make_mirror('a')
  mirror.push()
  written = []
  put = type(files).put_file
  monkeypatch.setattr(
    type(files), 'put_file', lambda self, a, b, **k: written.append(b) or put(self, a, b, **k)
  )
  mirror.push()
  assert written == []
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '12'})
  mirror.push()
  assert [path.rpartition('/')[2] for path in written] == ['metrics.jsonl']
  again = make_mirror('a')
  again.pull()
  again.push()
  assert len(written) == 1


def test_only_what_differs_is_downloaded(files, make_mirror, tmp_path, monkeypatch):
  """Files that are unchanged since the last push or pull stay, also in another process."""
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '1', 'sft/model/w': 'x', 'sft/log': 'y'})
  make_mirror('a').push()
  make_mirror('b').pull()
  read = []
  get = type(files).get_file
  monkeypatch.setattr(
    type(files), 'get_file', lambda self, a, b, **k: read.append(a) or get(self, a, b, **k)
  )
  for name in ('a', 'b'):
    make_mirror(name).pull()
  assert read == []
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '2'})
  files.pipe_file('/bucket/run/sft/model/w', b'z')
  make_mirror('a').pull()
  assert sorted(path.rpartition('/')[2] for path in read) == ['metrics.jsonl', 'w']
  assert _tree(tmp_path / 'a') == {'sft/metrics.jsonl': '1', 'sft/model/w': 'z', 'sft/log': 'y'}


def _limit_writes(files, monkeypatch, limit):
  """Raises Killed at the write or deletion after the first `limit`."""
  remaining = [limit]

  def limited(name):
    real = getattr(type(files), name)

    def call(self, *args, **kwargs):
      if not remaining[0]:
        raise Killed
      remaining[0] -= 1
      return real(self, *args, **kwargs)

    monkeypatch.setattr(type(files), name, call)

  for name in ('put_file', 'pipe_file', 'rm_file'):
    limited(name)


_OUTPUTS = {'model': 'sum of model'}


def _resumed(directory, key):
  """Returns what a run with this key resumes from: 'finished', its metrics, or None."""
  stage = directory / 'sft'
  stage_record.restore_old(stage, key)
  model = stage / 'model' / 'w'
  outputs = {'model': f'sum of {model.read_text()}'} if model.exists() else {}
  if stage_record.load_results_if_valid(stage, key, outputs) is not None:
    return 'finished'
  stage_record.prepare_directory(stage, key)
  metrics = stage / 'metrics.jsonl'
  return metrics.read_text() if metrics.exists() else None


@pytest.mark.parametrize('limit', range(6))
def test_killed_while_a_stage_is_finished(files, make_mirror, tmp_path, monkeypatch, limit):
  """The stage is finished with all its outputs, or unfinished with all its metrics."""
  stage, key, mirror = tmp_path / 'a' / 'sft', {'settings': {'seed': 0}}, make_mirror('a')
  stage_record.prepare_directory(stage, key)
  _fill(stage, {'metrics.jsonl': '1'})
  mirror.push()
  _fill(stage, {'metrics.jsonl': '12', 'model/w': 'model', 'model/v': ''})
  stage_record.record_results(stage, key, {'loss': 1}, _OUTPUTS)
  with monkeypatch.context() as patch:
    _limit_writes(files, patch, limit)
    is_killed = False
    try:
      mirror.push()
    except Killed:
      is_killed = True
  make_mirror('b').pull()
  assert is_killed == (limit < 4)
  assert _resumed(tmp_path / 'b', key) in (('1', '12', 'finished') if is_killed else ('finished',))


@pytest.mark.parametrize('limit', range(10))
def test_killed_while_an_old_stage_is_restored(files, make_mirror, tmp_path, monkeypatch, limit):
  """The stage of the earlier settings is on the bucket wherever the push is cut off."""
  stage, mirror = tmp_path / 'a' / 'sft', make_mirror('a')
  first, second = {'settings': {'seed': 0}}, {'settings': {'seed': 1}}
  stage_record.prepare_directory(stage, first)
  _fill(stage, {'metrics.jsonl': 'first'})
  mirror.push()
  assert stage_record.prepare_directory(stage, second) == 'seed changed'
  _fill(stage, {'metrics.jsonl': 'second', 'model/w': 'other'})
  mirror.push()
  stage_record.restore_old(stage, first)
  stage_record.prepare_directory(stage, first)
  with monkeypatch.context() as patch:
    _limit_writes(files, patch, limit)
    is_killed = False
    try:
      mirror.push()
    except Killed:
      is_killed = True
  assert is_killed == (limit < 8)
  make_mirror('b').pull()
  assert _resumed(tmp_path / 'b', first) == 'first'
  if not is_killed:
    assert _tree(tmp_path / 'b') == _tree(tmp_path / 'a')


@pytest.mark.parametrize('limit', range(6))
def test_killed_while_settings_change(files, make_mirror, tmp_path, monkeypatch, limit):
  """A run with new settings never resumes from files of the old ones."""
  stage, mirror, new = tmp_path / 'a' / 'sft', make_mirror('a'), {'settings': {'seed': 1}}
  stage_record.prepare_directory(stage, {'settings': {'seed': 0}})
  _fill(stage, {'metrics.jsonl': 'old'})
  mirror.push()
  stage_record.prepare_directory(stage, new)
  with monkeypatch.context() as patch:
    _limit_writes(files, patch, limit)
    with contextlib.suppress(Killed):
      mirror.push()
  make_mirror('b').pull()
  assert _resumed(tmp_path / 'b', new) is None


def test_a_failed_push_is_retried(files, make_mirror, tmp_path, monkeypatch):
  messages = []
  mirror = make_mirror('a', max_failures=2, log_fn=messages.append)
  _fill(tmp_path / 'a', {'sft/metrics.jsonl': '1'})

  def refuse(*_, **__):
    raise ConnectionError('no route\nto host')

  with monkeypatch.context() as patch:
    patch.setattr(type(files), 'put_file', refuse)
    assert not mirror.try_push() and not mirror.try_push()
    assert (
      messages == [f'warning: --workdir={URL} cannot be written: no route; trying again later'] * 2
    )
    with pytest.raises(UserError, match='no route; run the same command again'):
      mirror.try_push()
  assert mirror.try_push()
  make_mirror('b').pull()
  assert _tree(tmp_path / 'b') == {'sft/metrics.jsonl': '1'}


def test_a_run_that_stops_pushes_its_report_without_an_error(
  files, make_mirror, tmp_path, monkeypatch
):
  """An error of the bucket would hide the run's own."""
  messages = []
  mirror = make_mirror('a', log_fn=messages.append)
  _fill(tmp_path / 'a', {'report.html': 'stopped'})

  def refuse(*_, **__):
    raise ConnectionError('no route')

  with monkeypatch.context() as patch:
    patch.setattr(type(files), 'put_file', refuse)
    mirror.push_last()
  assert messages == [f'warning: --workdir={URL} cannot be written: no route']
  mirror.push_last()
  make_mirror('b').pull()
  assert _tree(tmp_path / 'b') == {'report.html': 'stopped'}


@pytest.mark.parametrize(
  'url, message',
  [
    ('nosuch://b/run', '--workdir=nosuch://b/run cannot be read: Protocol not known: nosuch'),
    ('gs://b/run', '--workdir=gs://b/run cannot be read: .*install gcsfs'),
  ],
)
def test_a_bucket_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, url, message):
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(ValueError, match=message):
    bucket_mirror.BucketMirror(url, tmp_path, 0, print)


def test_states_of_replaced_settings_are_removed(files, make_mirror, tmp_path):
  """The states of the current key and of the previous one are kept."""
  stage, mirror, fingerprints = tmp_path / 'a' / 'sft', make_mirror('a'), []
  for seed in range(3):
    stage_record.prepare_directory(stage, {'settings': {'seed': seed}})
    _fill(stage, {'metrics.jsonl': f'{seed}'})
    fingerprints.append(bucket_mirror.key_fingerprint(stage))
    files.pipe_file(f'/bucket/run/{bucket_mirror.STATES}/sft/{fingerprints[-1]}/1/state', b'')
    mirror.push_and_wait(stage)
  remaining = files.ls(f'/bucket/run/{bucket_mirror.STATES}/sft', detail=False)
  assert sorted(path.rpartition('/')[2] for path in remaining) == sorted(fingerprints[1:])


def test_a_bucket_that_cannot_hold_states_is_refused(files, make_mirror, tmp_path):
  refused = pytest.raises(UserError, match='cannot hold training states; use gs://')
  with refused, make_mirror('a').hold_lock(tmp_path):
    pass


@pytest.fixture
def short_intervals(monkeypatch):
  """Shortens the intervals of the lock."""
  for name, seconds in {'_HEARTBEAT': 0.05, '_STALE_AFTER': 0.5, '_RACE_WINDOW': 0.05}.items():
    monkeypatch.setattr(bucket_lock, name, seconds)


@pytest.fixture
def directory(files):
  return DirFileSystem('/bucket/run', files)


def _holder(run):
  return {'pid': os.getpid(), 'host': 'here', 'run': run}


def test_a_held_lock_is_refused_until_it_is_released(directory, short_intervals):
  with bucket_lock.lock_bucket(directory, URL, _holder('first'), {}):
    refused = pytest.raises(lock.LockedError, match=rf'{URL} is in use by process {os.getpid()} on')
    with refused, bucket_lock.lock_bucket(directory, URL, _holder('second'), {}):
      pass
  assert not directory.exists(lock.FILE)
  with bucket_lock.lock_bucket(directory, URL, _holder('third'), {}):
    pass


@pytest.mark.parametrize(
  'killed, is_waited_for',
  [
    ({}, True),
    (_holder('another'), True),
    (_holder('left'), False),
  ],
  ids=['none', 'another run', 'its holder'],
)
def test_a_lock_that_does_not_change_is_taken_over(
  directory, short_intervals, killed, is_waited_for
):
  """At once if its holder is known to be dead, else when it is stale."""
  directory.pipe_file(lock.FILE, json.dumps(_holder('left')).encode())
  waits = []
  with pytest.MonkeyPatch.context() as patch:
    sleep = time.sleep
    patch.setattr(time, 'sleep', lambda seconds: waits.append(seconds) or sleep(seconds))
    with bucket_lock.lock_bucket(directory, URL, _holder('new'), killed):
      assert json.loads(directory.cat_file(lock.FILE))['run'] == 'new'
  assert (bucket_lock._HEARTBEAT / 10 in waits) == is_waited_for


def test_a_killed_run_leaves_its_holder_in_the_local_directory(tmp_path):
  """The next run there takes the lock on the bucket over; a run that ended leaves none."""
  with lock.lock_workdir(tmp_path) as (first, killed):
    assert killed == {}
    left = (tmp_path / lock.FILE).read_text()
    refused = pytest.raises(lock.LockedError, match=f'{URL} is in use by process {os.getpid()} on')
    with refused, lock.lock_workdir(tmp_path, URL):
      pass
  (tmp_path / lock.FILE).write_text(left)
  with lock.lock_workdir(tmp_path) as (second, killed):
    assert killed == first and second['run'] != first['run']
  with lock.lock_workdir(tmp_path) as (_, killed):
    assert killed == {}
  (tmp_path / lock.FILE).write_text(left.replace(first['host'], 'elsewhere'))
  with lock.lock_workdir(tmp_path) as (_, killed):
    assert killed == {}


def test_a_run_killed_here_does_not_delay_the_next(
  files, make_mirror, tmp_path, monkeypatch, short_intervals
):
  monkeypatch.setattr(bucket_mirror.epath, 'Path', Path)  # accepts memory://
  local, on_bucket, waits = tmp_path / 'a', f'/bucket/run/{lock.FILE}', []
  with make_mirror('a').hold_lock(local):
    left = (local / lock.FILE).read_text(), files.cat_file(on_bucket)
  (local / lock.FILE).write_text(left[0])
  files.pipe_file(on_bucket, left[1])
  sleep = time.sleep
  monkeypatch.setattr(time, 'sleep', lambda seconds: waits.append(seconds) or sleep(seconds))
  with make_mirror('a').hold_lock(local):
    assert bucket_lock._HEARTBEAT / 10 not in waits
  assert not files.exists(on_bucket) and not (local / lock.FILE).read_text()


def test_of_two_runs_that_start_at_once_one_gets_the_lock(directory, short_intervals):
  outcomes = []

  def start(run):
    try:
      with bucket_lock.lock_bucket(directory, URL, _holder(run), {}):
        outcomes.append('locked')
        time.sleep(0.3)
    except lock.LockedError:
      outcomes.append('refused')

  threads = [threading.Thread(target=start, args=(run,)) for run in ('first', 'second')]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ['locked', 'refused']


_SMALL = {
  'demo.sft_rows': 64,
  'demo.pairs': 64,
  'network.max_position_embeddings': 64,
  'sft.max_steps': 6,
  'sft.batch_size': 8,
  'checkpoint.every_steps': 1,
}


def _start(buckets, run, local, *flags):
  """Starts a run on gs://bucket/`run`, which is a directory in `buckets`."""
  (buckets / 'bucket').mkdir(parents=True, exist_ok=True)
  settings = [f'--config.{key}={value}' for key, value in _SMALL.items()]
  command = [sys.executable, '-m', 'segjax.main', '--config=configs/ppo.py', *settings]
  path = os.pathsep.join([str(REPOSITORY / 'tests' / 'bucket'), str(REPOSITORY)])
  return subprocess.Popen(
    [
      *command,
      f'--workdir=gs://bucket/{run}',
      f'--local_copy={local}',
      '--config.stages=demo,sft',
      *flags,
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


def _wait(process):
  out, _ = process.communicate(timeout=240)
  return process.returncode, out


def _saved_steps(run):
  return [int(p.parent.name) for p in run.glob('checkpoints/sft/*/[0-9]*/commit_success.txt')]


def _metrics(run):
  lines = map(json.loads, (run / 'sft' / 'metrics.jsonl').read_text().splitlines())
  return [
    {k: v for k, v in line.items() if not k.startswith(('timing/', 'perf/'))} for line in lines
  ]


@pytest.mark.processes
def test_a_killed_run_resumes_from_the_bucket_alone(tmp_path):
  """After kill -9, with no local file left, another machine writes the same bits."""
  buckets, local = tmp_path / 'buckets', tmp_path / 'local'
  code, out = _wait(_start(buckets, 'uninterrupted', local))
  assert code == 0, out[-3000:]
  process, run = _start(buckets, 'killed', local), buckets / 'bucket' / 'killed'
  while max(_saved_steps(run), default=0) < 3 and process.poll() is None:
    time.sleep(0.02)
  process.kill()
  process.communicate()
  step = max(_saved_steps(run))
  assert 3 <= step < 6
  shutil.rmtree(local)
  code, out = _wait(_start(buckets, 'killed', tmp_path / 'another'))
  assert code == 0, out[-3000:]
  assert f'resuming from step {step} of 6' in out and 'demo        reused' in out
  uninterrupted = buckets / 'bucket' / 'uninterrupted'
  for name in ('demo/model/model.safetensors', 'sft/model/model.safetensors'):
    assert (run / name).read_bytes() == (uninterrupted / name).read_bytes()
  assert _metrics(run) == _metrics(uninterrupted)
  assert [line['step'] for line in _metrics(run)] == [0, 1, 2, 3, 4, 5]
  assert not _saved_steps(run) and not (run / lock.FILE).exists()
  code, out = _wait(_start(buckets, 'killed', tmp_path / 'a third'))
  assert code == 0 and 'sft         reused' in out


@pytest.mark.processes
def test_two_processes_work_on_one_bucket(tmp_path):
  """Each process has its own local copy; the run gives the losses of one process."""
  buckets = tmp_path / 'buckets'
  code, out = _wait(_start(buckets, 'one', tmp_path / 'one'))
  assert code == 0, out[-3000:]
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  flags = [f'--coordinator=localhost:{port}', '--num_processes=2']
  started = [
    _start(buckets, 'two', tmp_path / f'two{index}', *flags, f'--process_id={index}')
    for index in range(2)
  ]
  for process in started:
    code, out = _wait(process)
    assert code == 0, out[-3000:]
  one, two = (
    [line['sft/loss'] for line in _metrics(buckets / 'bucket' / run)] for run in ('one', 'two')
  )
  assert two == pytest.approx(one, rel=1e-5)
