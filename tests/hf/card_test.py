import huggingface_hub
import pytest

from segjax.hf import card
from segjax.hf.card import Card

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
  card.write(tmp_path, FULL, name='my-policy', head='language', with_template=True)
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
def test_nothing_known(head, with_template, word, task, tmp_path):
  card.write(tmp_path, Card(), name='x', head=head, with_template=with_template)
  loaded = _load(tmp_path)
  assert word in loaded.text and 'apply_chat_template' not in loaded.text
  assert (loaded.data.license, loaded.data.pipeline_tag) == ('unknown', task)
  assert loaded.data.base_model is None and loaded.data.eval_results is None


def test_a_licence_of_its_own_has_name_and_link(tmp_path):
  own = Card(license_name='my-licence', license_link='LICENSE')
  card.write(tmp_path, own, name='x', head='language', with_template=False)
  data = _load(tmp_path).data
  assert (data.license, data.license_name, data.license_link) == ('other', 'my-licence', 'LICENSE')


def test_inherited(tmp_path):
  assert card.inherited(tmp_path, tmp_path) == Card()
  assert card.inherited('owner/name', tmp_path) == Card(base_model='owner/name')
  card.write(tmp_path, FULL, name='x', head='language', with_template=False)
  known = Card(base_model='RLHFlow/LLaMA3-SFT-v2', license='llama3')
  assert card.inherited(str(tmp_path), tmp_path) == known
  assert card.inherited('owner/name', tmp_path).base_model == 'owner/name'
  (tmp_path / 'README.md').write_text('---\nbase_model:\n- a/b\n- c/d\nlicense: [x\n---\n')
  assert card.inherited(tmp_path, tmp_path) == Card()
  (tmp_path / 'README.md').write_text('---\nbase_model:\n- a/b\nlicense: mit\n---\n')
  assert card.inherited(tmp_path, tmp_path) == Card(base_model='a/b', license='mit')
  (tmp_path / 'README.md').write_text('# No metadata\n')
  assert card.inherited(tmp_path, tmp_path) == Card()


def test_merged():
  over = Card(stage='sft', license='mit')
  both = card.merged(FULL, over)
  assert (both.stage, both.license, both.base_model) == ('sft', 'mit', FULL.base_model)
  assert card.merged(FULL, Card()) == FULL
