"""Presets are consistent, and a wrong value is a one-line error with its key."""

import importlib

import pytest

from segjax.config import parse, presets, validate

PRESETS = [
  ('ppo', 'demo'),
  ('ppo', 'demo_long'),
  ('ppo', 'demo,token'),
  ('ppo', 'local,bandit'),
  ('ppo', 'llama3_8b_sft'),
  ('ppo', 'llama3_8b_sft,token'),
  ('ppo', 'llama3_8b_sft,bandit'),
  ('ppo', 'llama31_8b_instruct'),
  ('ppo', 'llama31_8b_instruct,token'),
  ('ppo', 'llama31_8b_instruct,bandit'),
  ('ppo', 'phi3_mini'),
  ('ppo', 'phi3_mini,token'),
  ('ppo', 'smollm2_135m'),
  ('ppo', 'llama32_3b'),
  ('sft', 'demo'),
  ('sft', 'local'),
  ('dpo', 'demo'),
  ('dpo', 'local'),
  ('dpo', 'llama3_8b_sft'),
  ('reward', 'demo,bandit'),
  ('reward', 'local,token'),
  ('reward', 'llama3_8b_sft'),
  ('reward', 'llama3_8b_sft,token'),
  ('reward', 'llama31_8b_instruct'),
  ('reward', 'llama31_8b_instruct,bandit'),
  ('dpo', 'qwen25_05b'),
  ('reward', 'phi3_mini'),
  ('reward', 'llama32_1b,token'),
  ('selfcheck', ''),
  ('normalizer', 'demo'),
  ('normalizer', 'local'),
  ('evaluate', 'demo'),
  ('evaluate', 'local'),
  ('evaluate_reward', ''),
  ('answers', ''),
  ('chat', ''),
]


def _config(**values):
  config = presets.default_config()
  config.stages = ('ppo',)
  config.update_from_flattened_dict(values)
  return config


@pytest.mark.parametrize('file, preset', PRESETS, ids=['-'.join(pair) for pair in PRESETS])
def test_presets_are_consistent(file, preset):
  arguments = [preset] if preset else []
  module = importlib.import_module(f'configs.{file}')
  resolved = parse.from_config(module.get_config(*arguments))
  granularity = preset.partition(',')[2]
  if granularity:
    segmentations = resolved.reward.segmentation, resolved.reward_model.segmentation
    assert granularity in [segmentation.granularity for segmentation in segmentations]
  if preset == 'local':
    assert resolved.stages == (file,)


@pytest.mark.parametrize(
  'granularity, normalizer',
  [('segment', 'segment@1.75'), ('token', 'token'), ('bandit', 'bandit')],
)
def test_published_recipe_of_phi3(granularity, normalizer):
  """Two passes over 60,917 prompts are 118 rollouts; the window of 2,047 holds all of a row."""
  config = importlib.import_module('configs.ppo').get_config(f'phi3_mini,{granularity}')
  s = parse.from_config(config)
  assert s.ppo.max_steps == 2 * 60_917 // s.ppo.rollout_batch_size
  assert s.reward_model.normalizer == f'published:phi3_mini_instruct/{normalizer}'
  assert s.reward_model.path == f'yyqoni/Phi-3-mini-4k-instruct-{granularity}-rm-700k'
  assert s.reward_model.segmentation.entropy_threshold == 1.75
  assert s.ppo.value_clip_eps == {'segment': 0.25, 'token': 0.25, 'bandit': 0.2}[granularity]
  assert (s.reward_shaping.length_norm, s.reward_shaping.length_penalty) == (False, 'off')
  positions = s.network.max_position_embeddings
  assert s.data.max_prompt_length + s.rollout.max_new_tokens == positions == 2047
  reward = importlib.import_module('configs.reward').get_config(f'phi3_mini,{granularity}')
  assert reward.reward.segmentation.entropy_threshold == 1.75
  assert reward.data.max_length == positions


@pytest.mark.parametrize('granularity', ['segment', 'token', 'bandit'])
@pytest.mark.parametrize('model', ['llama3_8b_sft', 'llama31_8b_instruct'])
def test_published_recipe(model, granularity):
  """Hyperparameters of the published runs, by granularity and model."""
  config = importlib.import_module('configs.ppo').get_config(f'{model},{granularity}')
  s = parse.from_config(config)
  assert s.ppo.value_clip_eps == {'segment': 0.25, 'token': 0.25, 'bandit': 0.2}[granularity]
  assert s.reward_shaping.length_norm == ((model, granularity) == ('llama3_8b_sft', 'token'))
  is_penalised = (model, granularity) == ('llama31_8b_instruct', 'segment')
  assert (s.reward_shaping.missing_eos_penalty, s.reward_shaping.length_penalty) == (
    ('per_token', 'threshold') if is_penalised else ('off', 'off')
  )
  assert (s.reward_shaping.missing_eos_penalty_value, s.reward_shaping.length_threshold) == (
    -0.05,
    800,
  )
  assert s.reward_model.path.endswith(f'-{granularity}-rm-700k')
  assert s.reward_model.normalizer == f'published:{model}/{granularity}'
  assert s.reward_model.segmentation.entropy_threshold == 2.0
  assert validate.resolve_spread(s, granularity) == (
    'bandit' if granularity == 'bandit' else 'even_split'
  )
  assert (
    s.ppo.max_steps,
    s.ppo.rollout_batch_size,
    s.ppo.minibatch_size,
    s.ppo.num_ppo_epochs,
  ) == (59, 1024, 128, 1)
  assert (s.ppo.policy_optimizer.learning_rate, s.ppo.critic_optimizer.learning_rate) == (
    5e-7,
    9e-6,
  )


@pytest.mark.parametrize('value', [None, True, False])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_old_logprobs_are_recomputed_in_bfloat16(dtype, value):
  """There the decode loop and the forward pass differ; a value of the user's own decides."""
  config = presets.default_config()
  config.runtime.compute_dtype = dtype
  if value is not None:
    config.rollout.recompute_logprob = value
  expected = dtype == 'bfloat16' if value is None else value
  assert validate.resolve_recompute_logprob(parse.from_config(config)) == expected


def test_old_logprobs_are_recomputed_beside_int8_weights():
  config = presets.default_config()
  config.rollout.weights_dtype = 'int8'
  assert validate.resolve_recompute_logprob(parse.from_config(config))


@pytest.mark.parametrize('preset', ['llama3_8b_sft', 'llama31_8b_instruct', 'llama3_70b'])
def test_presets_in_bfloat16_recompute(preset):
  config = importlib.import_module('configs.ppo').get_config(preset)
  assert validate.resolve_recompute_logprob(parse.from_config(config))


@pytest.mark.parametrize(
  'key, message',
  [
    ('ppo.kl_coeff', r'config.ppo.kl_coeff does not exist; did you mean config.ppo.kl_coef'),
    ('ppoo.kl_coef', 'did you mean config.ppo.kl_coef'),
    ('learning_rate', 'config.sft.optimizer.learning_rate'),
    ('network.remat', 'did you mean config.runtime.remat'),
    (
      'reward.optimizer.learningrate',
      'did you mean config.reward.optimizer.learning_rate',
    ),
    ('zzz', r'config.zzz does not exist\.'),
  ],
)
def test_unknown_key_names_the_nearest(key, message):
  with pytest.raises(ValueError, match=message):
    parse.check_key(key)


def test_keys_and_sections_are_accepted():
  for key in ('seed', 'ppo', 'ppo.policy_optimizer', 'ppo.policy_optimizer.learning_rate'):
    parse.check_key(key)


def test_unknown_key_in_a_config_file():
  config = presets.default_config()
  config.ppo.lamda = 1.0
  with pytest.raises(ValueError, match=r'config.ppo.lamda does not exist'):
    parse.from_config(config)


@pytest.mark.parametrize('stages', [('sft,reward',), ('sft', 'reward'), ('sft, reward',)])
def test_stages_may_be_joined_by_commas(stages):
  assert parse.from_config(_config(stages=stages)).stages == ('sft', 'reward')


def test_integers_become_floats():
  config = presets.default_config().to_dict()
  config['stages'], config['ppo']['kl_coef'] = ('ppo',), 1
  from ml_collections import ConfigDict

  assert isinstance(parse.from_config(ConfigDict(config)).ppo.kl_coef, float)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'stages': ('reward',), 'reward_model.path': 'x'}, 'config.stages trains a reward model'),
    (
      {'runtime.compute_dtype': 'bf16'},
      "runtime.compute_dtype='bf16' is not one of float32, bfloat16",
    ),
    ({'runtime.attention': 'eager'}, 'runtime.attention'),
    ({'runtime.remat': 'atention'}, "remat: 'atention' is not an activation; use none, full, or"),
    (
      {'runtime.offload_activations': 'full'},
      "offload_activations: 'full' is not an activation; use names out of hidden,query",
    ),
    (
      {'runtime.remat': 'gate,up', 'runtime.offload_activations': 'up'},
      'both name up; an activation is kept',
    ),
    (
      {'runtime.remat': 'none', 'runtime.offload_activations': 'up'},
      'which keeps everything on the device',
    ),
    ({'runtime.param_dtype': 'float16'}, 'runtime.param_dtype'),
    ({'ppo.critic_optimizer.moments_dtype': 'int8'}, 'ppo.critic_optimizer.moments_dtype'),
    ({'sft.optimizer.decayed_weights': 'norms'}, 'is not one of kernels, matrices, all'),
    ({'ppo.gamma': 1.5}, 'ppo.gamma=1.5 must be from 0 to 1'),
    ({'seed': -1}, 'config.seed=-1 must be at least 0'),
    ({'seed': 10**20}, 'config.seed=100000000000000000000 must be below 4294967296'),
    ({'sft.optimizer.max_grad_norm': -1.0}, 'max_grad_norm=-1.0 must be at least 0'),
    ({'reward.optimizer.min_lr_ratio': 2.0}, 'min_lr_ratio=2.0 must be from 0 to 1'),
    ({'reward.optimizer.beta2': 1.0}, 'beta2=1.0 must be at least 0 and below 1'),
    ({'runtime.frozen_params_memory': 'disk'}, 'runtime.frozen_params_memory'),
    ({'ppo.packing_length': 100, 'stages': ('ppo',)}, 'packing_length=100 is less than .* = 2752'),
    ({'ppo.packing_length': 4096}, 'or micro_batch_size of at least 1'),
    (
      {'sft.micro_batch_size': 8, 'sft.micro_batch_tokens': 8192},
      'config.sft.micro_batch_size=8 and sft.micro_batch_tokens=8192 both say',
    ),
    ({'ppo.micro_batch_tokens': -1}, 'ppo.micro_batch_tokens=-1 must be at least 0'),
    (
      {'reward.packing_length': 4096, 'reward.micro_batch_size': 1},
      'needs .*, or micro_batch_size of at least 2',
    ),
    (
      {
        'ppo.packing_length': 4096,
        'ppo.micro_batch_size': 8,
        'compat.first_row_attention_mask': True,
      },
      'first_row_attention_mask masks padded rows, and config.ppo.packing_length packs them',
    ),
    ({'data.overlong_policy': 'truncate'}, "did you mean 'truncate_left'"),
    (
      {'reward.segmentation.granularity': 'word'},
      "config.reward.segmentation.granularity='word' is not one of segment, token, "
      r'bandit\.',
    ),
    ({'reward.segmentation.boundary': 'entrpy'}, "did you mean 'entropy'"),
    ({'reward_model.segmentation.aggregation': 'avg'}, 'mean, sum, min, max, last, softmax'),
    ({'reward_model.normalizer': 'publshed:x'}, 'config.reward_model.normalizer'),
    (
      {'reward_model.normalizer': 'published:llama3_8b_sft/segmnt'},
      "did you mean 'published:llama3_8b_sft/segment'",
    ),
    ({'normalizer.kind': 'linear'}, 'is not one of auto, none, global, last, scalar, regression'),
    ({'normalizer.weighting': 'bins'}, 'is not one of uniform, count'),
    (
      {'reward_shaping.spread': 'even'},
      'is not one of auto, even_split, repeat, end_only, entropy_',
    ),
    ({'reward_shaping.redistribute': 'green'}, 'is not one of none, red'),
    ({'reward_shaping.red_baseline': 'one'}, 'is not one of prompt, zero'),
    ({'reward_shaping.missing_eos_penalty': 'on'}, 'is not one of off, per_token, at_eos'),
    ({'reward_shaping.length_penalty': 'on'}, 'is not one of off, threshold, linear'),
    ({'ppo.kl_placement': 'advantage'}, 'is not one of reward, loss'),
    ({'ppo.gae_level': 'word'}, 'is not one of token, segment'),
    ({'ppo.loss_aggregation': 'batch'}, 'is not one of sequence, token'),
    ({'ppo.kl_estimator': 'k4'}, 'is not one of k1, k2, k3'),
    ({'data.max_prompt_length': 2048}, 'leaves no room for a response'),
    ({'rollout.min_new_tokens': 2000}, 'is more than config.rollout.max_new_tokens=1024'),
    ({'rollout.top_p': 0.0}, 'config.rollout.top_p=0.0'),
    ({'reward.holdout_fraction': 0.0}, 'must be between 0 and 1'),
    ({'ppo.max_steps': 0}, 'config.ppo.max_steps=0 must be at least 1'),
    ({'data.max_rows': -1}, 'config.data.max_rows=-1 must be at least 0'),
    ({'ppo.policy_optimizer.learning_rate': -1.0}, 'learning_rate=-1.0 must be at least 0'),
    ({'sft.optimizer.learning_rate': float('inf')}, 'learning_rate=inf must be finite'),
    ({'sft.optimizer.warmup_ratio': 3.0}, 'warmup_ratio=3.0'),
    ({'demo.min_clauses': 9}, 'must be from 1 to config.demo.max_clauses=5'),
    ({'ppo.minibatch_size': 100}, 'use ppo.minibatch_size=64 or ppo.rollout_batch_size=1100'),
    ({'ppo.scoring_batch_size': 3}, 'not divisible by config.ppo.scoring_batch_size=3'),
    ({'rollout.samples_per_prompt': 5}, 'not divisible by config.rollout.samples_per_prompt=5'),
    (
      {'ppo.micro_batch_size': 3},
      'config.ppo.minibatch_size=128 is not divisible by config.ppo.micro_batch_size=3',
    ),
    ({'ppo.dual_clip_ratio': 0.5}, 'must be above 1, or 0'),
    ({'ppo.importance_clip': 0.5}, 'importance_clip=0.5 must be at least 1, or 0 for no weights'),
    ({'reward.threshold_search.entropy_quantile': 1.0}, 'below 1'),
    ({'reward.segmentation.softmax_temperature': 0.0}, 'must be above 0'),
  ],
)
def test_wrong_values_name_their_key(values, message):
  with pytest.raises(ValueError, match=message):
    parse.from_config(_config(**values))


def test_a_batch_goes_at_once_if_it_is_smaller_than_the_limit():
  config = importlib.import_module('configs.ppo').get_config('local')

  def sizes(s):
    return s.ppo.micro_batch_size, s.ppo.scoring_batch_size, s.sft.micro_batch_size

  assert sizes(parse.from_config(config)) == (16, 64, 16)
  config.ppo.rollout_batch_size = config.ppo.minibatch_size = config.sft.batch_size = 4
  assert sizes(parse.from_config(config)) == (4, 4, 4)


@pytest.mark.parametrize(
  'values, message',
  [
    (
      {
        'reward.segmentation.granularity': 'token',
        'reward.threshold_search.entropy_quantile': 0.8,
      },
      'set config.reward.segmentation.granularity=segment, or both targets to 0',
    ),
    (
      {
        'reward.segmentation.boundary': 'delimiter',
        'reward.threshold_search.target_segment_length': 8.0,
      },
      'set config.reward.segmentation.boundary=entropy',
    ),
    (
      {
        'reward.threshold_search.entropy_quantile': 0.8,
        'reward.threshold_search.target_segment_length': 8.0,
      },
      'set one of them to 0',
    ),
    (
      {
        'reward.segmentation.granularity': 'bandit',
        'reward.segmentation.min_segment_length': 4,
      },
      'min_segment_length=4 has no effect with granularity=bandit',
    ),
    (
      {'reward.segmentation.boundary': 'score_jump'},
      'reward.segmentation.boundary=score_jump .* none before training',
    ),
    (
      {
        'reward_model.segmentation.boundary': 'score_jump',
        'reward_shaping.reward_model_weight': 0.0,
        'reward_shaping.reward_fn': 'math:sqrt',
      },
      'reward_model.segmentation.boundary=score_jump .* use another boundary',
    ),
    (
      {'reward.segmentation.boundary': 'function'},
      "reward.segmentation: boundary=function needs .* set boundary_fn='module:function'",
    ),
    (
      {'reward.segmentation.boundary_fn': 'm:f'},
      "boundary_fn='m:f' has no effect with boundary=entropy",
    ),
    (
      {'reward_shaping.credit': 'min', 'reward_shaping.spread': 'bandit'},
      'reward_shaping.credit=min weighs .* or credit=sum',
    ),
    ({'ppo.learn_share': 0.0}, 'ppo.learn_share=0.0 must be above 0 and at most 1'),
    (
      {'ppo.learn_on': 'segment_starts', 'reward_model.segmentation.granularity': 'bandit'},
      'learn_on=segment_starts leaves .*; set config.ppo.learn_on=all',
    ),
    ({'reward_shaping.credit_temperature': 0.0}, 'credit_temperature=0.0 must be above 0'),
    (
      {'reward_model.segmentation.probability_threshold': 1.5},
      'probability_threshold=1.5 must be above 0 and at most 1',
    ),
    (
      {
        'reward_model.segmentation.granularity': 'token',
        'reward_model.segmentation.boundary': 'delimiter',
      },
      'set granularity=segment, or boundary=entropy',
    ),
    (
      {
        'stages': ('normalizer',),
        'reward_model.segmentation.granularity': 'bandit',
        'normalizer.kind': 'regression',
      },
      'granularity=bandit has one segment; use scalar',
    ),
    (
      {
        'stages': ('reward', 'normalizer'),
        'reward.segmentation.granularity': 'bandit',
        'normalizer.kind': 'regression',
      },
      'granularity=bandit has one segment; use scalar',
    ),
    (
      {
        'reward_model.segmentation.granularity': 'bandit',
        'reward_model.normalizer': 'published:llama3_8b_sft/segment',
      },
      'granularity=bandit has one segment',
    ),
    (
      {'reward_shaping.redistribute': 'red', 'reward_model.segmentation.granularity': 'bandit'},
      'granularity=token or segment',
    ),
    (
      {'reward_shaping.redistribute': 'red', 'reward_shaping.spread': 'bandit'},
      'reward_shaping.spread=auto',
    ),
    ({'ppo.kl_placement': 'loss'}, 'its gradient is 0 on average'),
    ({'reward_shaping.reward_model_weight': 0.0}, r'leaves no reward; .* set .*lm_reward\.kind'),
    (
      {'reward_shaping.lm_reward.path': 'x'},
      r'lm_reward\.path=x has no effect with kind=off; set .*kind=implicit or teacher',
    ),
    (
      {'reward_shaping.lm_reward.kind': 'teacher', 'reward_shaping.lm_reward.coef': 0.0},
      r'lm_reward\.coef=0 makes all rewards of the model 0',
    ),
    (
      {
        'reward_shaping.lm_reward.kind': 'implicit',
        'reward_shaping.lm_reward.path': 'x',
        'policy.path': 'x',
      },
      r"lm_reward\.path='x' is the reference too, so that all its rewards are 0",
    ),
    ({'dpo.label_smoothing': 0.5}, r'config\.dpo\.label_smoothing=0.5 must be below 0.5'),
    ({'dpo.beta': 0.0}, r'config\.dpo\.beta=0.0 must be above 0'),
    ({'dpo.holdout_fraction': 0.0}, r'config\.dpo\.holdout_fraction=0.0 must be between 0 and 1'),
    (
      {'rollout.samples_per_prompt': 8, 'rollout.max_concurrent': 4},
      r'samples_per_prompt=8 is more than config\.rollout\.max_concurrent=4.*to 8 or more, or to 0',
    ),
    ({'rollout.tensor': -1}, 'rollout.tensor=-1 must be at least 0'),
    (
      {
        'ppo.importance_clip': 2.0,
        'rollout.recompute_logprob': False,
        'runtime.compute_dtype': 'bfloat16',
      },
      'importance_clip=2.0 without the log-probs of the trained policy',
    ),
    (
      {'rollout.weights_dtype': 'int8', 'rollout.recompute_logprob': False},
      'weights_dtype=int8 are of rounded weights; set config.rollout.recompute_logprob=None',
    ),
    (
      {'ppo.importance_clip': 2.0, 'compat.force_eos': True},
      'force_eos puts in tokens that were not drawn',
    ),
    (
      {'rollout.carry': True, 'rollout.samples_per_prompt': 4},
      'config.rollout.samples_per_prompt=4 with rollout.carry=True',
    ),
    ({'reward_shaping.reward_model_weight': 0.0}, 'name a config.reward_shaping.reward_fn'),
    (
      {'stages': ('ppo',), 'ppo.estimator': 'group_norm'},
      r'group_norm compares .* config\.rollout\.samples_per_prompt=1; set it to 2 or more\.',
    ),
    (
      {'stages': ('ppo',), 'ppo.estimator': 'reinforce_plus_plus', 'ppo.whiten': False},
      'whiten=False has no baseline; set config.ppo.whiten=True',
    ),
  ],
)
def test_contradictions_are_refused_with_the_fix(values, message):
  with pytest.raises(ValueError, match=message):
    parse.from_config(_config(**values))


@pytest.mark.parametrize(
  'section, key, value, message',
  [
    ('ppo', 'max_steps', True, 'config.ppo.max_steps=True must be of type int'),
    ('ppo', 'max_steps', '3', "config.ppo.max_steps='3' must be of type int"),
    ('ppo', 'whiten', 1, 'must be of type bool'),
    ('data', 'path', None, 'config.data.path=None must be of type str'),
    ('ppo', 'policy_optimizer', 1e-3, 'must be a section with keys of its own'),
  ],
)
def test_wrong_types_name_their_key(section, key, value, message):
  from ml_collections import ConfigDict

  config = presets.default_config().to_dict()
  config['stages'], config[section][key] = ('ppo',), value
  with pytest.raises(ValueError, match=message):
    parse.from_config(ConfigDict(config))
