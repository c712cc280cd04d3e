import dataclasses

import jax
import numpy as np
from model import tiny

from segjax.model.decode import generate
from segjax.settings import Rollout as RolloutSettings
from segjax.train.rollout import sampling

from . import setting
from .compiles import compiled


def test_pieces_are_generated_one_by_one(caplog):
  """Rows 4 to 7 come from a call of their own, with a key of their own."""
  params = setting.network('policy', tiny.mesh(1))
  with compiled(caplog) as names:
    rollout = setting.sample(params)
  assert names.count('generate') <= 1
  prompts = tiny.ids(seed=31, shape=(tiny.BATCH, setting.PROMPT))
  np.testing.assert_array_equal(rollout.prompt_ids, prompts)
  np.testing.assert_array_equal(rollout.prompt_length, setting.LENGTHS)
  for start in (0, 4):
    rows = slice(start, start + 4)
    out = generate(
      params,
      rollout.prompt_ids[rows],
      rollout.prompt_length[rows],
      jax.random.fold_in(jax.random.key(0), start),
      config=tiny.CONFIG,
      sampling=sampling(setting.ROLLOUT),
      stop_ids=tiny.STOP_IDS,
    )
    np.testing.assert_array_equal(rollout.response_ids[rows], out.response_ids)
    np.testing.assert_array_equal(rollout.response_mask[rows], out.response_mask)
    np.testing.assert_array_equal(rollout.finished[rows], out.finished)
    np.testing.assert_allclose(rollout.old_logprob[rows], out.logprob, atol=1e-5)  # float32


def test_sampling_reads_the_settings():
  settings = RolloutSettings(
    temperature=0.5, top_k=3, top_p=0.9, min_new_tokens=2, max_new_tokens=7, batch=4
  )
  read = dataclasses.asdict(sampling(settings))
  assert read == {key: value for key, value in dataclasses.asdict(settings).items() if key in read}
  assert len(read) == 5
