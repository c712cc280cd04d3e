"""Two processes write one checkpoint; a killed one leaves nothing that looks complete."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import hf_models, tokenizers

from segjax.hf import adapter, convert, reader, writer

REPOSITORY = Path(__file__).resolve().parents[2]

WORKER = """
import sys
from pathlib import Path
from segjax import processes
address, index, source, out, own = sys.argv[1:]
processes.initialize(address, 2, int(index))
from segjax.data.tokenizer import load_tokenizer
from segjax.hf import adapter, adapter_writer, model_card, reader, shards, writer
from segjax.model.mesh import make_mesh
mesh = make_mesh(2, 2, 2)
config = reader.load_config(source)
params = reader.load_params(source, config, 'language', mesh)
assert not params['lm_head']['kernel'].is_fully_addressable
write = shards.ShardWriter.write
def record(self, name, *rest):
  print('wrote', name, flush=True)
  write(self, name, *rest)

shards.ShardWriter.write = record
writer.save_checkpoint(out, params, config, 'language', source=source, max_shard_bytes=20_000)
config = reader.load_config(own)
trained = adapter.load_trained(adapter.read_adapter(Path(own)), config, 'language', mesh)
assert not trained['adapter']['layers']['query']['a'].is_fully_addressable
assert not trained['lm_head']['kernel'].is_fully_addressable
others = {'card': model_card.Card(), 'tokenizer': load_tokenizer(source)}
adapter_writer.save_adapter(
  Path(own + '-saved'), trained, config, 'language', base=source, source=Path(source), **others
)
"""


@pytest.mark.processes
def test_two_processes_write_one_checkpoint(tmp_path):
  source = hf_models.write(tmp_path / 'a', 'biases')
  tokenizers.write_tokenizer(source)
  own = hf_models.write_adapter(tmp_path / 'd', source, modules_to_save=['lm_head'])
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    address = f'localhost:{probe.getsockname()[1]}'
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  command = [sys.executable, '-c', WORKER, address]
  workers = [
    subprocess.Popen(
      [*command, str(index), source, tmp_path / 'b', own],
      **{'cwd': REPOSITORY, 'env': environment, 'stdout': subprocess.PIPE, 'text': True},
    )
    for index in range(2)
  ]
  try:
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
  finally:
    for worker in workers:
      worker.kill()
  # Each wrote half of the tensors, into the same files as one process alone.
  first, second = (re.findall('^wrote (.*)$', output, re.MULTILINE) for output in outputs)
  assert 0 <= len(first) - len(second) <= 1 < len(second) and not set(first) & set(second)
  config = reader.load_config(source)
  params = reader.load_params(source, config, 'language')
  alone = writer.save_checkpoint(
    tmp_path / 'c', params, config, 'language', source=source, max_shard_bytes=20_000
  )
  names = sorted(file.name for file in alone.iterdir())
  assert len([name for name in names if name.endswith('.safetensors')]) > 2
  assert sorted(file.name for file in (tmp_path / 'b').iterdir()) == names
  for name in names:
    assert (tmp_path / 'b' / name).read_bytes() == (alone / name).read_bytes(), name
  hf_models.assert_same_tensors(source, tmp_path / 'b')
  assert hf_models.torch_logits(tmp_path / 'b', hf_models.IDS).shape[0]  # transformers loads it
  hf_models.assert_same_tensors(own, tmp_path / 'd-saved')
  assert adapter.read_adapter(tmp_path / 'd-saved').base == str(source)
  assert sorted(file.name for file in tmp_path.iterdir()) == ['a', 'b', 'c', 'd', 'd-saved']


HANGING = """
import sys, time
from segjax.hf import convert, shards, tensor_slices
direction, source, out = sys.argv[1:]

def hang_at_tenth(function, calls=[]):
  def wrapper(*args, **kwargs):
    calls.append(1)
    if len(calls) > 10:
      print('hangs', flush=True)
      time.sleep(600)
    return function(*args, **kwargs)
  return wrapper

tensor_slices.SliceReader.read = hang_at_tenth(tensor_slices.SliceReader.read)
shards.ShardWriter.write = hang_at_tenth(shards.ShardWriter.write)
if direction == 'import':
  convert.import_checkpoint(source, out, piece_bytes=2000)
else:
  convert.export_checkpoint(source, out)
"""


def test_a_kill_leaves_nothing_that_looks_complete(tmp_path):
  source = hf_models.write(tmp_path / 'a', max_shard_size='20KB')
  orbax = convert.import_checkpoint(source, tmp_path / 'b')
  outs = {'import': tmp_path / 'i' / 'out', 'export': tmp_path / 'e' / 'out'}
  workers = [
    subprocess.Popen(
      [sys.executable, '-c', HANGING, direction, source if direction == 'import' else orbax, out],
      **{'cwd': REPOSITORY, 'stdout': subprocess.PIPE, 'text': True},
    )
    for direction, out in outs.items()
  ]
  try:
    # Several threads may print at once, on one line.
    assert all(worker.stdout.readline().startswith('hangs') for worker in workers)
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.wait(60) for worker in workers] == [-signal.SIGKILL] * 2
  for direction, out in outs.items():
    (partial,) = out.parent.iterdir()
    assert partial.name.startswith('.out.partial-')
    assert not (partial / 'config.json').exists() and not (partial / 'segjax.json').exists()
    with pytest.raises(ValueError, match=r'no segjax\.json'):
      convert.export_checkpoint(partial, tmp_path / 'c')
    # The next run that writes to this directory removes what is left.
    if direction == 'import':
      convert.import_checkpoint(source, out)
    else:
      convert.export_checkpoint(orbax, out)
      hf_models.assert_same_tensors(source, out)
    assert list(out.parent.iterdir()) == [out]
    shutil.rmtree(out)
