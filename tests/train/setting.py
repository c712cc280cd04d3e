"""Networks, batches and constants that the tests of the steps share, so that each compiles once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from model import tiny

from segjax.data.batches import TokenBatch
from segjax.model import sharding
from segjax.settings import PPO, SFT, Optimizer, Reward, Rollout, Segmentation, Shaping
from segjax.train.cutting import Cutter
from segjax.train.experience import Recipe
from segjax.train.optimizer import init_state
from segjax.train.reward_step import Scorer
from segjax.train.rollout import rollout
from segjax.types import PreferenceBatch, Sequences

# Adam divides an element's gradient by its own size. With epsilon below the noise of float32 sums,
# one element whose gradient is 0 but for that noise would decide how far two runs differ.
OPTIMIZER = Optimizer(learning_rate=1e-3, warmup_ratio=0.0, epsilon=1e-5)
TOTAL = 20  # updates that the schedules expect
PROMPT, RESPONSE = 8, 16
LENGTHS = np.array([1, 8, 3, 5, 8, 2, 7, 4], np.int32)
THRESHOLD = 3.0  # nats; the entropies of these networks lie around it

PPO_SETTINGS = PPO(
  score_batch=4,
  kl_coef=0.1,
  gamma=0.99,
  policy_optimizer=OPTIMIZER,
  critic_optimizer=OPTIMIZER,
)
ROLLOUT = Rollout(max_new_tokens=RESPONSE, slots=4)
REWARD, FINE_TUNING = Reward(optimizer=OPTIMIZER), SFT(optimizer=OPTIMIZER)


def cutter(granularity='segment', entropy_threshold=THRESHOLD, **values):
  """Of the network's own entropies, unless the values say otherwise."""
  return Cutter(Segmentation(granularity, entropy_threshold=entropy_threshold, **values))


SCORER = Scorer(tiny.CONFIG, tiny.CONFIG, cutter())


def recipe(granularity='segment', spread='even_split', ppo=PPO_SETTINGS, **values):
  """All four networks of one shape."""
  fields = {'cutter': cutter(granularity), 'shaping': Shaping()} | values
  return Recipe(*[tiny.CONFIG] * 4, spread=spread, ppo=ppo, **fields)


SEEDS = {'policy': 0, 'reference': 0, 'reward': 1, 'critic': 2}


def network(name, mesh, config=tiny.CONFIG):
  """Parameters on the mesh; policy and reference start alike."""
  head = 'language' if name in ('policy', 'reference') else 'scalar'
  return tiny.place(tiny.params(config, head, SEEDS[name]), mesh)


def state(name, mesh=None, config=tiny.CONFIG):
  """A fresh training state of that network."""
  return init_state(network(name, mesh or tiny.mesh(1), config), OPTIMIZER, TOTAL)


def conversations(mesh=None):
  """Tokens, and which of them are trained on."""
  ids = tiny.ids(seed=11)
  mask = np.random.default_rng(12).random(ids.shape) < 0.6
  return sharding.place_batch(TokenBatch(ids, mask), mesh or tiny.mesh(1))


def sequences(seed, length=tiny.LENGTH):
  """Rows with a prompt, a response of any length, one row with nothing, one with a stop alone."""
  rng = np.random.default_rng(seed)
  begin = rng.integers(1, 6, tiny.BATCH)
  stop = begin + rng.integers(2, 11, tiny.BATCH)
  stop[0], stop[1] = begin[0], begin[1] + 1
  finished = rng.random(tiny.BATCH) < 0.6
  finished[1] = True
  position = np.arange(length)
  mask = (begin[:, None] <= position) & (position < stop[:, None])
  ids = np.zeros((tiny.BATCH, length), np.int32)
  ids[:, :16] = rng.integers(0, tiny.VOCAB, (tiny.BATCH, 16))
  return Sequences(*map(jnp.asarray, (ids, mask, finished)))


def pairs(mesh=None, length=tiny.LENGTH):
  """Pairs of such rows."""
  batch = PreferenceBatch(sequences(21, length), sequences(22, length))
  return sharding.place_batch(batch, mesh or tiny.mesh(1))


def sample(params, mesh=None, settings=ROLLOUT, **values):
  """A rollout of eight ragged prompts, four at once."""
  return rollout(
    params,
    tiny.ids(seed=31, shape=(tiny.BATCH, PROMPT)),
    LENGTHS,
    jax.random.key(0),
    config=tiny.CONFIG,
    settings=settings,
    stop_ids=tiny.STOP_IDS,
    mesh=mesh or tiny.mesh(1),
    **values,
  )


copied = functools.partial(jax.tree.map, np.array)
