"""Python for the README.md of an exported model, which runs without segjax.

The code reads what it needs from the model's directory, so that it holds for a normaliser that is
fitted later too.
"""

import json
from collections.abc import Mapping
from typing import Any


def usage(
  name: str, head: str, with_template: bool, base: str, record: Mapping[str, Any]
) -> list[str]:
  """Returns the lines of the section Usage.

  Args:
    name: name of the model.
    head: 'language' or 'scalar'.
    with_template: whether the tokenizer has a chat template.
    base: directory or hub id of an adapter's base; '' for a whole model.
    record: provenance, see `model_card.Card`.
  """
  reference = _reference(record) if head == 'scalar' and with_template else ''
  cut = _CUTS.get(_segmentation(record)) if reference else None
  snippet = _SCORE if head == 'scalar' else _CHAT if with_template else _COMPLETE
  if cut:
    snippet = _SEGMENTS.replace('REFERENCE', json.dumps(reference)).replace('CUT', cut)
  snippet = snippet.replace('NAME', json.dumps(name))
  for before, after in _WITH_PEFT if base else ():
    snippet = snippet.replace(before, after)
  lines = ['## Usage', '', '```python', snippet, '```', '']
  return [*lines, _FROM_SERVER, '', '```python', _SERVER, '```', ''] if cut else lines


def _reference(record: Mapping[str, Any]) -> str:
  """Returns the model whose entropy cuts the segments of a reward model; '' if it is not known."""
  models = record.get('models')
  path = models.get('reference') if isinstance(models, dict) else None
  return path if isinstance(path, str) and record.get('stage') == 'reward' else ''


def _segmentation(record: Mapping[str, Any]) -> tuple[Any, ...]:
  """Returns granularity, boundary, minimum length of a segment, and whether EOS belongs to one."""
  section: Any = record
  for key in ('settings', 'reward', 'segmentation'):
    section = section.get(key) if isinstance(section, dict) else None
  section = section if isinstance(section, dict) else {}
  keys = 'granularity', 'boundary', 'min_segment_length', 'include_eos'
  return tuple(section.get(key) for key in keys)


# Where a segment starts, by `_segmentation`; other ways to cut are left to segjax.
_CUTS = {
  ('segment', 'entropy', 1, False): (
    "t == begin or entropy[t - 1] > spec['entropy_threshold']"  # of the distribution drawn from
  ),
  ('token', 'entropy', 1, False): 'True',
}

_SEGMENTS = """\
import json
from math import log

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import cached_file

model_name, reference_name = NAME, REFERENCE
spec = json.load(open(cached_file(model_name, 'segment_reward.json')))
fit = spec['normalizer'] or {'w_mean': 0, 'b_mean': 0, 'w_std': 0, 'b_std': 1}
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForSequenceClassification.from_pretrained(model_name)
reference = AutoModelForCausalLM.from_pretrained(reference_name)  # whose entropy cuts

messages, answer = [{'role': 'user', 'content': 'Why is the sky blue?'}], 'Air scatters blue light.'
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
encode = lambda text: tokenizer(text, add_special_tokens=False, return_tensors='pt')['input_ids']
begin, ids = encode(prompt).shape[1], encode(prompt + answer)
with torch.no_grad():
  scores = model.score(model.model(ids).last_hidden_state)[0, :, 0].tolist()
  entropy = torch.distributions.Categorical(logits=reference(ids).logits[0].float()).entropy()

starts = [t for t in range(begin, ids.shape[1]) if CUT]
for k, (start, end) in enumerate(zip(starts, [*starts[1:], ids.shape[1]]), 1):
  p = k / len(starts)
  mean, std = (fit['w_' + x] * log(p) + fit['b_' + x] for x in ('mean', 'std'))
  text, score = tokenizer.decode(ids[0, start:end]), scores[end - 1]
  print(repr(text), 'score', score, 'normalised', (score - mean) / std)"""

_FROM_SERVER = """\
From a server of token scores, such as vLLM (`vllm serve MODEL --runner pooling`), the scores are"""

_SERVER = """\
from urllib.request import Request, urlopen

body = {'model': model_name, 'input': ids[0].tolist(), 'task': 'token_classify'}
body = json.dumps(body | {'use_activation': False}).encode()
request = Request('http://localhost:8000/pooling', body, {'Content-Type': 'application/json'})
scores = [token[0] for token in json.load(urlopen(request))['data'][0]['data']]"""

_CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = NAME
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

messages = [{'role': 'user', 'content': 'Why is the sky blue?'}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors='pt', add_special_tokens=False)
outputs = model.generate(
  inputs['input_ids'], attention_mask=inputs['attention_mask'], max_new_tokens=128
)
print(tokenizer.decode(outputs[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))"""

_COMPLETE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = NAME
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

inputs = tokenizer('Once upon a time', return_tensors='pt')
outputs = model.generate(inputs['input_ids'], max_new_tokens=50)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))"""

_SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model_name = NAME
model = AutoModelForSequenceClassification.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

inputs = tokenizer('Once upon a time', return_tensors='pt')
print(model(inputs['input_ids']).logits)  # the score at the last token"""

# The same with an adapter on its base: which tokens end a text, and how many scores there are, is
# not what the base has.
_WITH_PEFT = (
  (
    'from transformers import AutoModelForCausalLM, AutoTokenizer',
    'from peft import AutoPeftModelForCausalLM\n'
    'from transformers import AutoTokenizer, GenerationConfig',
  ),
  (
    'from transformers import AutoModelForSequenceClassification, AutoTokenizer',
    'from peft import AutoPeftModelForSequenceClassification\n'
    'from transformers import AutoTokenizer',
  ),
  (
    '= AutoModelForCausalLM.from_pretrained(model_name)',
    '= AutoPeftModelForCausalLM.from_pretrained(model_name)\n'
    'model.generation_config = GenerationConfig.from_pretrained(model_name)',
  ),
  (
    'from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, '
    'AutoTokenizer',
    'from peft import AutoPeftModelForSequenceClassification\n'
    'from transformers import AutoModelForCausalLM, AutoTokenizer',
  ),
  (
    '= AutoModelForSequenceClassification.from_pretrained(model_name)',
    '= AutoPeftModelForSequenceClassification.from_pretrained(model_name, num_labels=1)',
  ),
  (
    'scores = model.score(model.model(ids)',
    'model = model.merge_and_unload()\n  scores = model.score(model.model(ids)',
  ),
)
