"""Rewards and advantages of a rollout as the compiler for H100 makes them."""

import subprocess
import sys

import pytest

from segjax.plan import cuda_compiler

pytestmark = pytest.mark.compiled

SCRIPT = """
import sys
from segjax.config.settings import Network, Settings, replace
from segjax.model.llama import make_config
from segjax.model.mesh import make_mesh
from segjax.plan import cuda_compiler, phases, ppo_programs

cuda_compiler.prepare()
settings = replace(
  Settings(),
  stages=('ppo',),
  network=Network(512, 32, 48, 2, 4, 2, 2048),
  **{'rollout.max_new_tokens': 1024, 'data.max_prompt_length': 16},
  **{'ppo.rollout_batch_size': 1024, 'ppo.minibatch_size': 1024, 'ppo.gae_level': sys.argv[1]},
  **{'reward_model.segmentation.min_segment_length': 2},
)
mesh = make_mesh(1, 1, 1, cuda_compiler.devices('H100-80GB', 1, 1))
network = make_config(settings.network)
plan = ppo_programs.ppo_programs(settings, network, mesh, 8e10, 'ultrafeedback')
rewards = next(phase for phase in plan.phases if phase.name == 'rewards')
print(phases.lower_phase(rewards, mesh).compile().as_text())
"""


@pytest.mark.skipif(not cuda_compiler.is_installed(), reason='no compiler for CUDA')
@pytest.mark.parametrize('gae_level', ['token', 'segment'])
def test_no_loop_over_tokens(gae_level):
  """Each pass of a loop over 1,024 tokens would be a launch or more."""
  command = [sys.executable, '-c', SCRIPT, gae_level]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  entry = done.stdout[done.stdout.index('\nENTRY') :]
  assert ' while(' not in done.stdout
  assert 20 < entry.count(' fusion(') < 200  # launches; there were 105 beside three loops
