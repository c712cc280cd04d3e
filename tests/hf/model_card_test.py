import json

import huggingface_hub
import pytest

from segjax.hf import model_card
from segjax.hf.model_card import Card

FULL = Card(
  base_model='RLHFlow/LLaMA3-SFT-v2',
  stage='ppo',
  recipe='configs/ppo.py:llama3_8b_sft',
  metrics={'gold': 0.5, 'eos_rate': 1, 'bad': float('nan')},
  dataset='held-out prompts: "HH", ünïcode',
  license='llama3',
)


def _load(directory):
  return huggingface_hub.ModelCard.load(directory / 'README.md')


def test_the_hub_reads_every_field(tmp_path):
  model_card.write_card(tmp_path, FULL, name='my-policy', head='language', with_template=True)
  loaded = _load(tmp_path)
  data = loaded.data
  assert data.base_model == 'RLHFlow/LLaMA3-SFT-v2'
  assert (data.license, data.license_name) == ('llama3', None)
  assert (data.stage, data.recipe) == ('ppo', 'configs/ppo.py:llama3_8b_sft')
  assert (data.library_name, data.pipeline_tag) == ('transformers', 'text-generation')
  assert data.tags == ['segjax', 'rlhf', 'ppo']
  assert data.metrics == ['gold', 'eos_rate']
  assert data.model_name == 'my-policy'
  results = [(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results]
  assert results == [('gold', 0.5, FULL.dataset), ('eos_rate', 1.0, FULL.dataset)]
  assert '| gold | 0.5 |' in loaded.text
  assert 'nan' not in loaded.content
  assert 'apply_chat_template' in loaded.text and 'model_name = "my-policy"' in loaded.text


@pytest.mark.parametrize(
  ('head', 'with_template', 'word', 'task'),
  [
    ('language', False, 'AutoModelForCausalLM', 'text-generation'),
    ('scalar', True, 'AutoModelForSequenceClassification', 'text-classification'),
  ],
)
def test_empty_card(head, with_template, word, task, tmp_path):
  model_card.write_card(tmp_path, Card(), name='x', head=head, with_template=with_template)
  loaded = _load(tmp_path)
  assert word in loaded.text and 'apply_chat_template' not in loaded.text
  assert (loaded.data.license, loaded.data.pipeline_tag) == ('unknown', task)
  assert loaded.data.base_model is None and loaded.data.eval_results is None


def test_a_licence_of_its_own_has_name_and_link(tmp_path):
  own = Card(license_name='my-licence', license_link='LICENSE')
  model_card.write_card(tmp_path, own, name='x', head='language', with_template=False)
  data = _load(tmp_path).data
  assert (data.license, data.license_name, data.license_link) == ('other', 'my-licence', 'LICENSE')


def test_inherited(tmp_path):
  assert model_card.from_source(tmp_path, tmp_path) == Card()
  assert model_card.from_source('owner/name', tmp_path) == Card(base_model='owner/name')
  model_card.write_card(tmp_path, FULL, name='x', head='language', with_template=False)
  known = Card(base_model='RLHFlow/LLaMA3-SFT-v2', license='llama3')
  assert model_card.from_source(str(tmp_path), tmp_path) == known
  assert model_card.from_source('owner/name', tmp_path).base_model == 'owner/name'
  (tmp_path / 'README.md').write_text('---\nbase_model:\n- a/b\n- c/d\nlicense: [x\n---\n')
  assert model_card.from_source(tmp_path, tmp_path) == Card()
  (tmp_path / 'README.md').write_text('---\nbase_model:\n- a/b\nlicense: mit\n---\n')
  assert model_card.from_source(tmp_path, tmp_path) == Card(base_model='a/b', license='mit')
  (tmp_path / 'README.md').write_text('# No metadata\n')
  assert model_card.from_source(tmp_path, tmp_path) == Card()


def test_merged():
  over = Card(stage='sft', license='mit')
  both = model_card.merge(FULL, over)
  assert (both.stage, both.license, both.base_model) == ('sft', 'mit', FULL.base_model)
  assert model_card.merge(FULL, Card()) == FULL


RECORD = {
  'stage': 'reward',
  'recipe': 'configs/reward.py:local',
  'command': "python -m segjax.main --config.data.chat_template='```'",
  'seed': 3,
  'data': {'path': 'owner/pairs', 'hub': 'owner/pairs', 'split': 'train', 'rows': 9, 'used': 7},
  'metrics': {'loss': 0.25, 'margin': 'nan'},
  'versions': {'segjax': '0.1.0', 'jax': '0.10.2'},
  'commit': 'abc-dirty',
  'devices': {'kind': 'TPU v5p', 'count': 8},
  'settings': {'seed': 3, 'data': {'chat_template': '| a </details> ````'}},
}


def test_the_record_is_written_and_shown(tmp_path):
  one = Card(record=RECORD, curves=b'png')
  model_card.write_card(tmp_path, one, name='x', head='scalar', with_template=False)
  assert json.loads((tmp_path / 'segjax_config.json').read_text()) == RECORD
  assert (tmp_path / 'curves.png').read_bytes() == b'png'
  loaded = _load(tmp_path)
  assert (loaded.data.stage, loaded.data.recipe) == ('reward', 'configs/reward.py:local')
  assert loaded.data.datasets == ['owner/pairs']
  assert [(r.metric_type, r.dataset_name) for r in loaded.data.eval_results] == [
    ('loss', 'owner/pairs')
  ]
  assert '](curves.png)' in loaded.text
  for text in ('| seed | 3 |', 'rows 9, used 7', 'jax 0.10.2', 'abc-dirty', 'TPU v5p, count 8'):
    assert text in loaded.text, text
  # A fence is longer than any run of backticks inside it.
  assert f'\n````bash\n{RECORD["command"]}\n````\n' in loaded.text
  _, _, folded = loaded.text.partition('<details>')
  body = folded.partition('\n`````json\n')[2].partition('\n`````\n')[0]
  assert json.loads(body) == RECORD['settings']
  assert folded.rstrip().endswith('</details>')


def test_a_record_in_the_directory_is_shown_again(tmp_path):
  (tmp_path / 'segjax_config.json').write_text(json.dumps(RECORD))
  model_card.write_card(tmp_path, Card(stage='ppo'), name='x', head='language', with_template=False)
  data = _load(tmp_path).data
  assert (data.stage, data.recipe) == ('ppo', 'configs/reward.py:local')
  assert '](curves.png)' not in _load(tmp_path).text


@pytest.mark.parametrize('text', ['[1]', '{"data": 3, "metrics": [], "stage": {}}', 'no JSON', ''])
def test_a_foreign_file_of_that_name_is_ignored(tmp_path, text):
  (tmp_path / 'segjax_config.json').write_text(text)
  model_card.write_card(tmp_path, Card(), name='x', head='language', with_template=False)
  assert _load(tmp_path).data.get('stage') is None
  assert (tmp_path / 'segjax_config.json').read_text() == text


def test_special_characters_are_escaped_in_cells(tmp_path):
  odd = Card(recipe='a`b\nc', metrics={'x|y<b>\nz': 1.0}, dataset='p|q', base_model='`')
  model_card.write_card(tmp_path, odd, name='x', head='language', with_template=False)
  text = _load(tmp_path).text
  assert 'Recipe: `` a`b c ``' in text
  assert '| x\\|y&lt;b> z | 1 |' in text and '| metric (p\\|q) | value |' in text
