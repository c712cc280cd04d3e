"""PPO on dense segment rewards: rollout, scoring, advantages, clipped updates, HF export."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.checks import spread
from segjax.data.batches import stream_indices
from segjax.data.encoding import Limits, encode_prompts
from segjax.hf.writer import save_checkpoint
from segjax.jobs import stage as jobs
from segjax.jobs.stage import Stage
from segjax.model.llama import LlamaConfig
from segjax.train import segment_reward
from segjax.train.experience import Recipe, make_experience, score
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import ppo_step
from segjax.train.rollout import rollout

SHOW = ['reward', 'kl', 'length', 'segments']  # of the metrics, beside the bar
CRITICS = ('policy', 'reward_model')  # what config.critic.init may name, but for a path


def run(stage: Stage) -> dict[str, Any]:
  """Trains config.policy.path on the prompts of config.data.path; writes `model/` and `critic/`."""
  s = stage.settings
  policy_path = jobs.checkpoint(s.policy.path, 'policy.path')
  reference_path = jobs.checkpoint(s.reference.path, 'reference.path')
  reward_path = jobs.checkpoint(s.reward_model.path, 'reward_model.path')
  meaning = segment_reward.resolve(s.reward_model, reward_path, policy_path)
  segment_reward.check_tokenizer(reference_path, policy_path)
  critic_path = dict(zip(CRITICS, (policy_path, reward_path), strict=True)).get(s.critic.init)
  critic_path = critic_path or jobs.checkpoint(s.critic.init, 'critic.init')
  recipe = Recipe(
    policy=jobs.network(stage, policy_path, trained=True),
    reference=jobs.network(stage, reference_path),
    reward=jobs.network(stage, reward_path),
    critic=jobs.network(stage, critic_path, trained=True),
    granularity=meaning.granularity,
    entropy_threshold=meaning.entropy_threshold,
    spread=spread(s, meaning.granularity),
    ppo=s.ppo,
    recompute_logprob=s.rollout.recompute_logprob,
  )
  tokenizer = jobs.tokenizer_of(stage, policy_path)
  prompts = encode_prompts(jobs.rows(stage), tokenizer, prompt_limits(stage, recipe))
  jobs.describe(stage, prompts)
  stage.say(
    f'{meaning.granularity} rewards, threshold {meaning.entropy_threshold} nats, '
    f'{meaning.normalizer_kind} normaliser, spread {recipe.spread}'
  )
  frozen = {
    'reference': jobs.load(stage, reference_path, recipe.reference, 'language'),
    'reward': jobs.load(stage, reward_path, recipe.reward, 'scalar'),
  }
  per_rollout = s.ppo.epochs * (s.ppo.rollout_batch // s.ppo.minibatch)
  total_updates = s.ppo.steps * per_rollout
  policy = jobs.load(stage, policy_path, recipe.policy, 'language', trained=True)
  critic = jobs.load(stage, critic_path, recipe.critic, 'scalar', trained=True)
  states = {
    'policy': init_state(policy, s.ppo.policy_optimizer, total_updates),
    'critic': init_state(critic, s.ppo.critic_optimizer, total_updates),
  }
  normalizer = jax.tree.map(jnp.float32, meaning.normalizer)

  def step_fn(states, step):
    key = jax.random.fold_in(stage.key('rollout'), step)
    rows = stream_indices(len(prompts), s.ppo.rollout_batch, s.seed, step)
    batch = prompts.gather(rows, np.asarray)
    found = rollout(
      states['policy'].params,
      batch.prompt_ids,
      batch.prompt_length,
      key,
      config=recipe.policy,
      settings=s.rollout,
      stop_ids=tokenizer.stop_ids,
      mesh=stage.mesh,
    )
    params = frozen | {name: state.params for name, state in states.items()}
    scored = score(params, found, recipe=recipe)
    experience, metrics = make_experience(found, scored, normalizer, recipe=recipe)
    states, updates = update(states, experience, recipe, (s.seed, step), total_updates)
    return states, metrics | updates

  states, last = jobs.train(stage, states, step_fn, s.ppo.steps, SHOW)
  save_checkpoint(
    stage.model_directory, states['policy'].params, recipe.policy, 'language', source=policy_path
  )
  save_checkpoint(
    stage.directory / 'critic', states['critic'].params, recipe.critic, 'scalar', source=critic_path
  )
  return {'steps': s.ppo.steps} | {name: last.get(name) for name in SHOW}


def update(
  states: jobs.States,
  experience: Any,
  recipe: Recipe,
  seed: tuple[int, int],
  total_updates: int,
) -> tuple[jobs.States, dict[str, Any]]:
  """`ppo.epochs` passes over the rollout in shuffled minibatches; metrics are means over them."""
  policy, critic, found = states['policy'], states['critic'], []
  ppo = recipe.ppo
  for epoch in range(ppo.epochs):
    order = np.random.default_rng([*seed, epoch]).permutation(ppo.rollout_batch)
    for rows in order.reshape(-1, ppo.minibatch):
      policy, critic, metrics = ppo_step(
        policy, critic, experience, rows, recipe=recipe, total_steps=total_updates
      )
      found.append(metrics)
  first = {'policy/first_ratio_max_deviation': found[0]['policy/ratio_max_deviation']}
  return {'policy': policy, 'critic': critic}, _mean(found) | first


@jax.jit
def _mean(found: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  return jax.tree.map(lambda *values: jnp.mean(jnp.stack(values).astype(jnp.float32)), *found)


def prompt_limits(stage: Stage, recipe: Recipe) -> Limits:
  """What of a prompt is kept: the networks' positions less config.rollout.max_new_tokens."""
  s = stage.settings
  networks: dict[str, LlamaConfig] = {
    name: getattr(recipe, name) for name in ('policy', 'reference', 'reward', 'critic')
  }
  name, network = min(networks.items(), key=lambda item: item[1].max_position_embeddings)
  room = network.max_position_embeddings - s.rollout.max_new_tokens
  if room < 1:
    raise ValueError(
      f'config.rollout.max_new_tokens={s.rollout.max_new_tokens} leaves no room for a prompt in '
      f'the {network.max_position_embeddings} positions of the {name}; make it smaller.'
    )
  most = min(s.data.max_prompt_length, room)
  if most < s.data.max_prompt_length:
    stage.say(
      f'prompts are at most {most} tokens, for the {name} has '
      f'{network.max_position_embeddings} positions and responses take up to '
      f'{s.rollout.max_new_tokens}'
    )
  return Limits(most, most, s.data.overlong)
