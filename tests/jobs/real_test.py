"""All stages on a model and on pairs that nobody here made."""

import json

import pytest

from segjax.config import parse, presets, settings
from segjax.model.mesh import make_mesh

TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


@pytest.fixture(scope='module')
def values(shared_files):
  """Settings of a few tiny steps of every stage on 64 of the pairs, in packed rows."""
  config = presets.default_config()
  config.stages = ('sft', 'reward', 'normalizer', 'ppo', 'evaluate')
  config.update_from_flattened_dict(
    {
      'policy.path': str(shared_files / 'models' / 'stories260k-hf'),
      'data.path': str(shared_files / 'data' / 'hh_harmless' / 'pairs.jsonl.gz'),
      'data.chat_template': TEMPLATE,
      'data.max_rows': 64,
      'data.max_length': 128,
      'data.max_prompt_length': 64,
      'runtime.remat': 'none',
      'sft.batch_size': 8,
      'sft.max_steps': 2,
      'sft.micro_batch_size': 4,
      'sft.packing_length': 128,
      'reward.batch_size': 8,
      'reward.max_steps': 2,
      'reward.micro_batch_size': 4,
      'reward.packing_length': 128,
      'reward.holdout_fraction': 0.2,
      'normalizer.batch_size': 16,
      'normalizer.max_pairs': 32,
      'rollout.max_new_tokens': 8,
      'ppo.max_steps': 2,
      'ppo.rollout_batch_size': 8,
      'ppo.minibatch_size': 4,
      'ppo.micro_batch_size': 4,
      'ppo.packing_length': 128,
      'runtime.frozen_params_memory': 'host',
      'evaluate.batch_size': 8,  # as in PPO: one program less to compile
    }
  )
  return parse.from_config(config)


@pytest.mark.campaign
def test_every_stage_on_real_input(values, run, tmp_path, capsys):
  import torch
  import transformers

  results = run(values)
  out = capsys.readouterr().out
  assert ' truncated, padded to 128 tokens' in out
  assert results['sft']['rows'] == 64
  assert results['reward']['held_out_pairs'] >= 12
  stored = json.loads((tmp_path / 'reward' / 'model' / 'segment_reward.json').read_text())
  assert stored['normalizer']['kind'] == 'regression'
  assert len(stored['tokenizer_sha256']) == 64
  assert results['evaluate']['before']['kl_nats'] == pytest.approx(0, abs=1e-3)
  assert results['evaluate']['after']['score']['n'] == 64
  lines = (tmp_path / 'ppo' / 'metrics.jsonl').read_text().splitlines()
  first = json.loads(lines[0])
  assert len(lines) == 2 and first['skipped_updates'] == 0
  assert first['policy/initial_ratio_deviation'] < 1e-4
  assert abs(first['objective/kl']) < 1e-3
  for stage in ('sft', 'reward', 'ppo'):  # all are packed
    text = (tmp_path / stage / 'metrics.jsonl').read_text()
    assert 0.3 < json.loads(text.splitlines()[0])['perf/packing_efficiency'] <= 1
  assert 'memory per device' in out

  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ppo' / 'model')
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ppo' / 'model')
  ids = tokenizer('user: Once upon a time\n', return_tensors='pt')['input_ids']
  with torch.no_grad():
    words = model.generate(ids, max_new_tokens=8, do_sample=False)
  assert words.shape[1] > ids.shape[1]
  critic = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'ppo' / 'critic'
  )
  assert critic.config.num_labels == 1

  for model in ('sft/model', 'reward/model', 'ppo/model', 'ppo/critic'):
    assert '](curves.png)' in (tmp_path / model / 'README.md').read_text()
    (tmp_path / model / 'README.md').write_text('edited')
  capsys.readouterr()
  assert run(values) == results
  assert capsys.readouterr().out.count('reused from') == 5


@pytest.mark.campaign
def test_bandit_on_real_input(values, run):
  changed = settings.replace(
    values,
    stages=('reward', 'normalizer'),
    **{'reward.segmentation.granularity': 'bandit'},
  )
  assert run(changed)['normalizer']['kind'] == 'scalar'


def test_template_is_needed_for_a_tokenizer_without_one(values, run):
  with pytest.raises(ValueError, match=r'stories260k-hf: the tokenizer has no chat template'):
    run(settings.replace(values, **{'data.chat_template': ''}))


def test_the_same_stages_fit_eight_devices(values, tmp_path):
  from segjax.jobs import pipeline

  stages = pipeline.prepare(values, tmp_path, make_mesh(2, 2, 2))
  assert [stage.name for stage in stages] == list(values.stages)
