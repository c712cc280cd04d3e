"""Contributions of tokens to the score at the last one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from fixtures import adapters, hf_models, models

from segjax.hf import reader
from segjax.model.attribution import attention_attribution, gradient_attribution
from segjax.model.heads import scores

IDS = jnp.asarray(models.ids())
LAST = jnp.array([IDS.shape[1] - 1] + [5] * (len(IDS) - 1))


@pytest.fixture(scope='module')
def params():
  return models.params(models.CONFIG, head='scalar')


@pytest.mark.campaign
@pytest.mark.parametrize('config', [models.CONFIG, adapters.config()], ids=['plain', 'adapter'])
def test_gradient_is_the_change_of_the_score_to_first_order(params, config):
  if config.lora:
    params = params | adapters.adapter(params, config.lora)
  attribution = np.asarray(
    jax.jit(gradient_attribution, static_argnums=3)(params, IDS, LAST, config)
  )
  # The embedding of a token, wherever it occurs, is moved to and from the mean.
  table, step = params['backbone']['embedding'], 1e-2
  score = functools.partial(scores, config=config)
  for row, position in ((0, 3), (0, int(LAST[0])), (1, 2)):
    ids = IDS[row : row + 1]
    token = int(ids[0, position])
    positions = np.flatnonzero(np.asarray(ids[0]) == token)
    moved = []
    for sign in (1, -1):
      shift = sign * step * (table[token] - table.mean(0))
      backbone = params['backbone'] | {'embedding': table.at[token].add(shift)}
      moved.append(float(score(params | {'backbone': backbone}, ids)[0, LAST[row]]))
    slope = (moved[0] - moved[1]) / (2 * step)
    expected = sum(attribution[row, p] for p in positions if p <= LAST[row])
    assert slope == pytest.approx(expected, rel=2e-2, abs=2e-3)
  assert not attribution[1, 6:].any()  # behind the last token


def test_attention_is_that_of_transformers(tmp_path):
  path = hf_models.write(tmp_path, head='scalar')
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    path, attn_implementation='eager'
  )
  with torch.no_grad():
    ids = torch.tensor(hf_models.IDS, dtype=torch.long)
    expected = model(ids, output_attentions=True).attentions[-1].mean(1).numpy()
  config = reader.load_config(path)
  params = reader.load_params(path, config, 'scalar')
  last = jnp.array([hf_models.IDS.shape[1] - 1, 4])
  ours = attention_attribution(params, jnp.asarray(hf_models.IDS), last, config)
  np.testing.assert_allclose(ours, expected[[0, 1], last], atol=1e-5)
