"""Head and embedding of Llama-3's vocabulary as the compiler for H100 makes them."""

import functools
import json
import re
import subprocess
import sys

import pytest

from segjax.plan import cuda_compiler

pytestmark = pytest.mark.compiled

# Log-probs and entropies of two rows of 2,048 tokens per device, and their gradient: D 4,096.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from segjax.model import heads
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import make_mesh
from segjax.plan import abstract_arrays, topologies
from segjax.plan.hlo_cost import program_cost

topology, tied, tensor = topologies.parse(sys.argv[1]), sys.argv[2] == 'tied', int(sys.argv[3])
topologies.prepare(topology)
mesh = make_mesh(1, -1, tensor, topologies.devices(topology))
config = LlamaConfig(128256, 4096, 1024, 2, 16, 8, 128, tie_word_embeddings=tied, dtype='bfloat16')
params = abstract_arrays.params(config, 'language', 'float32', mesh, trained=True)
ids = abstract_arrays.batch(mesh, jnp.int32, 2 * topology.count // tensor, 2048)

def loss(params, ids):
  logprob, entropy = heads.token_logprobs(params, ids, config)
  return jnp.sum(logprob**2) + jnp.sum(entropy)

compiled = abstract_arrays.lower(mesh, jax.jit(jax.grad(loss)), (params, ids), {}).compile()
text = compiled.as_text()
cost = program_cost(text, topology.chip, [0] * topology.count)
bytes_of = {}
for c in cost.collectives:
  bytes_of[c.kind] = bytes_of.get(c.kind, 0) + c.bytes
temporaries = compiled.memory_analysis().temp_size_in_bytes
print(json.dumps({'text': text, 'temporaries': temporaries, 'bytes': cost.bytes} | bytes_of))
"""
H100 = 'cuda:8xH100-80GB'
KERNEL = 4096 * 128256


@functools.cache
def compiled(topology, weights, tensor=1):
  """Returns the text, bytes of temporaries and of memory traffic, and those of collectives."""
  if not cuda_compiler.is_installed():
    pytest.skip('no compiler for CUDA')
  command = [sys.executable, '-c', SCRIPT, topology, weights, str(tensor)]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('weights', ['untied', 'tied'])
def test_what_crosses_devices(weights):
  """The kernel twice in bfloat16, its gradient once; of the embedding, states of own tokens."""
  record = compiled(H100, weights)
  layers = 2 * 2 * (4096 * 128 * (2 * 16 + 2 * 8) + 3 * 4096 * 1024)  # bytes of two
  gathered = record['all-gather'] - 2 * 2 * KERNEL
  assert 0 < gathered < 3 * layers
  wide = re.findall(r'= \(?f32\[([\d,]+)\][^=]* all-gather', record['text'])
  assert max((int(n) for shape in wide for n in shape.split(',')), default=0) < 8000
  states = 2 * 2 * 2048 * 4096
  assert record['all-to-all'] == pytest.approx(2 * states, rel=0.1)
  # A piece of the kernel's gradient is scattered when it is complete.
  assert 4 * KERNEL < record['reduce-scatter'] + record['all-reduce'] < 4.1 * KERNEL + 3 * layers


def test_one_piece_lives_at_once():
  """Logits in float32, their gradient in bfloat16, two gradients of a piece of the kernel."""
  record = compiled(H100, 'untied')
  tokens, piece = 2 * 2048, 8064
  logits = 6 * tokens * piece
  kernel = piece * 4096 * (2 + 2 * 4)
  states = tokens * 4096 * 4 * 4
  gradients = 2 * 4 * KERNEL // 8  # of head and embedding
  assert record['temporaries'] < logits + kernel + states + gradients


def test_vocabulary_over_the_tensor_axis():
  """Sums per token cross devices, and hidden states of the group: no logits."""
  record = compiled(H100, 'untied', 8)
  assert not re.search(r'\[\d+,16032\][^=]* all-(gather|reduce)', record['text'])
  assert record['all-gather'] < 40 * 2 * 2048 * 4096
