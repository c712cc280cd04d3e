"""Attention in packed rows as the compilers for H100, A100 and TPU make it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from segjax.plan import cuda_compiler

pytestmark = pytest.mark.compiled

# Three scanned layers of attention and its backward pass: B 4, S 2,560, H 32, K 8, h 128.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from segjax.model import sharding
from segjax.model.attention import attention
from segjax.model.mesh import make_mesh
from segjax.model.remat import checkpoint_policy
from segjax.plan import abstract_arrays, topologies

name, implementation, packed = sys.argv[1:]
topology = topologies.parse(name)
topologies.prepare(topology)
mesh = make_mesh(1, -1, min(topology.count, 2), topologies.devices(topology))

def layer(x, ids):
  x = jax.ad_checkpoint.checkpoint_name(sharding.constrain(x, 'heads'), 'query')
  groups = x.reshape(4, 2560, 8, 6, 128)  # of four query heads, their key and their value
  key, value = groups[:, :, :, 4], groups[:, :, :, 5]
  query = groups[:, :, :, :4].reshape(4, 2560, 32, 128)
  output = attention(query, key, value, implementation, segment_ids=ids).reshape(4, 2560, 8, 4, 128)
  return jnp.concatenate([jnp.tanh(output), groups[:, :, :, 4:]], axis=3).reshape(x.shape)

def loss(x, ids):
  saved = jax.checkpoint(layer, policy=checkpoint_policy('query,attention', ''), prevent_cse=False)
  return jnp.sum(jax.lax.scan(lambda x, _: (saved(x, ids), None), x, None, 3)[0] ** 2)

def shape(dtype, name, *sizes):
  spec = sharding.fitted(sharding.ACTIVATION_RULES[name], sizes, mesh)
  layout = jax.sharding.NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(sizes, dtype, sharding=layout)

ids = shape(jnp.int32, 'tokens', 4, 2560) if packed == 'packed' else None
x = shape(jnp.bfloat16, 'heads', 4, 2560, 48, 128)
program = abstract_arrays.lower(mesh, jax.jit(jax.grad(loss)), (x, ids), {}).compile()
print(json.dumps([program.as_text(), program.memory_analysis().temp_size_in_bytes]))
"""


def compiled(topology, implementation, packed, flags=''):
  """Returns (text, bytes of temporaries) of the program."""
  if not (importlib.util.find_spec('libtpu') if 'v5' in topology else cuda_compiler.is_installed()):
    pytest.skip(f'no compiler for {topology}')
  done = subprocess.run(
    [sys.executable, '-c', SCRIPT, topology, implementation, packed],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    env=os.environ | {'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {flags}'},
  )
  return json.loads(done.stdout.splitlines()[-1])


KERNELS = {
  'flash': ('"flash_forward"', '"flash_dq"', '"flash_dkv"'),
  'cudnn': (r'"__cudnn\$fmhaSoftmax"', r'"__cudnn\$fmhaSoftmaxBackward"'),
  'splash': (r'%splash_mqa_fwd\S* = ', r'%splash_mqa_dq\S* = ', r'%splash_mqa_dkv\S* = '),
}


@pytest.mark.parametrize(
  ('topology', 'implementation', 'packed'),
  [
    ('cuda:1xH100-80GB', 'cudnn', 'packed'),
    ('cuda:4xH100-80GB', 'flash', 'packed'),
    ('cuda:4xH100-80GB', 'cudnn', 'not packed'),
    ('v5p:2x2x1', 'splash', 'packed'),
  ],
)
def test_kernels_run_once_and_exchange_nothing(topology, implementation, packed):
  """The backward pass runs no forward kernel, because output and sums are saved."""
  text, temporaries = compiled(topology, implementation, packed)
  chosen = 'flash' if (implementation, packed) == ('cudnn', 'packed') else implementation
  assert [len(re.findall(name, text)) for name in KERNELS[chosen]] == [1] * len(KERNELS[chosen])
  assert not re.findall(r' (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(', text)
  assert '2560,2560' not in text
  devices = 4 if '4x' in topology or '2x2' in topology else 1
  saved = 3 * 4 * 2560 * (48 + 32) * 128 * 2 / devices
  assert saved < temporaries < 2 * saved  # beside it what one layer needs


def kernels(folder):
  """Yields (kernel, registers, bytes of spills) of the PTX files in a folder, by the assembler."""
  spec = importlib.util.find_spec('nvidia')
  found = [p for f in spec.submodule_search_locations for p in Path(f).glob('*/bin/ptxas')]
  assembler = shutil.which('ptxas') or found[0]
  for path in Path(folder).glob('*.ptx'):
    text = path.read_text(encoding='utf-8')
    if kernel := re.search(r'\.entry (flash_\w+)', text):
      target = re.search(r'\.target (\w+)', text)[1]
      command = [assembler, '-v', f'-arch={target}', path, '-o', os.devnull]
      said = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
      registers, spills = (
        re.search('Used ([0-9]+)', said),
        re.search('([0-9]+) bytes spill s', said),
      )
      yield kernel[1], int(registers[1]), int(spills[1])


@pytest.mark.parametrize(('chip', 'spilt'), [('H100-80GB', 0), ('A100-80GB', 128)])
def test_kernels_fit_into_registers(tmp_path, chip, spilt):
  """On an A100, whose products read registers alone, a thread spills a few of its 255."""
  compiled(f'cuda:1x{chip}', 'flash', 'packed', f'--xla_dump_to={tmp_path}')
  measured = list(kernels(tmp_path))
  assert {kernel for kernel, _, _ in measured} == {'flash_forward', 'flash_dq', 'flash_dkv'}
  for kernel, registers, spills in measured:
    assert registers <= 65536 // 256, kernel
    assert spills <= spilt, kernel
