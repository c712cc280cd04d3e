"""A check of packed rows in bfloat16: they round alike when they are scored and when trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.data.packing_plan import PieceBound, plan_level_packing
from segjax.model import sharding
from segjax.model.attention import select_implementation
from segjax.model.heads import init_params
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import batch_devices
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import Minibatch, policy_step
from segjax.train.recipe import PPORecipe
from segjax.train.rollout_scoring import score
from segjax.types import Experience

_HEAD = 64  # numbers of a head; the kernels of packed rows have no fewer
_ROW = 1024  # tokens; widths then are multiples of the kernels' blocks


def first_ratio_deviation(mesh: Mesh, experience: Experience, recipe: PPORecipe) -> float:
  """Returns the largest |π / π_old - 1| of a first update of packed rows in bfloat16.

  Args:
    mesh: the devices.
    experience: what is learned from, by fresh networks.
    recipe: of networks of other sizes.
  """
  config = _config(mesh, recipe.policy)
  recipe = dataclasses.replace(
    recipe, policy=config, reference=config, reward=None, critic=None, recompute_logprob=True
  )
  rollout, optimizer = experience.rollout, recipe.ppo.policy_optimizer
  length = np.asarray(rollout.prompt_length) + np.asarray(rollout.response_mask).sum(axis=1)
  rows = np.arange(len(length))
  plan = plan_level_packing(length, PieceBound(batch_devices(mesh), _ROW, _ROW))
  # As in a run: the other checks multiply float32 at full precision.
  with jax.set_mesh(mesh), jax.default_matmul_precision('default'):
    params = _init(config, mesh)
    outputs = score(
      {'policy': params, 'reference': params},
      rollout,
      length,
      recipe=recipe,
      minibatches=[(rows, plan)],
    )
    rollout = dataclasses.replace(rollout, old_logprob=outputs.old_logprob)
    experience = dataclasses.replace(experience, rollout=rollout)
    _, metrics = policy_step(
      init_state(params, optimizer, 10),
      Minibatch(experience, rows, plan),
      jnp.float32(0.0),
      recipe=recipe,
      total_steps=10,
    )
  return float(metrics.max['ratio_max_deviation'])


def _config(mesh: Mesh, config: LlamaConfig) -> LlamaConfig:
  platform = mesh.devices.flat[0].platform
  attention, _ = select_implementation('auto', platform, 'bfloat16', _HEAD)
  return dataclasses.replace(config, head_dim=_HEAD, dtype='bfloat16', attention=attention)


def _init(config: LlamaConfig, mesh: Mesh) -> Any:
  params = jax.jit(init_params, static_argnums=(1, 2))(jax.random.key(0), config, 'language')
  return jax.device_put(params, sharding.tree_shardings(params, mesh))
