"""The code of a reward model's card gives segjax's segment rewards, by transformers alone."""

import contextlib
import http.server
import io
import json
import threading

import numpy as np
import pytest
from fixtures import hf_models, tokenizers

import segjax
from segjax.config.settings import Segmentation
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.hf import card_snippets
from segjax.train.reward_spec import RewardSpec, write_spec
from segjax.types import Normalizer

CHAT = [
  {'role': 'user', 'content': 'Why is the sky blue?'},
  {'role': 'assistant', 'content': 'Air scatters blue light.'},
]
NORMALIZER = Normalizer(0.8967, 0.5680, 0.8572, 4.1667)


def _record(segmentation, reference):
  return {
    'stage': 'reward',
    'models': {'reference': str(reference)},
    'settings': {'reward': {'segmentation': vars(segmentation)}},
  }


def _blocks(lines):
  return [part.split('```')[0] for part in '\n'.join(lines).split('```python\n')[1:]]


@pytest.mark.campaign
@pytest.mark.parametrize('granularity', ['segment', 'token'])
@pytest.mark.parametrize('is_adapter', [False, True], ids=['whole', 'adapter'])
def test_the_card_computes_segment_rewards(granularity, is_adapter, tmp_path):
  reference = hf_models.write(tmp_path / 'sft', vocab_size=320)
  tokenizers.write_tokenizer(reference)
  if is_adapter:
    pytest.importorskip('peft')
    model = hf_models.write_adapter(tmp_path / 'rm', reference, 'scalar')
  else:
    model = hf_models.write(tmp_path / 'rm', head='scalar', vocab_size=320)
  tokenizers.write_tokenizer(model)
  segmentation = Segmentation(granularity=granularity, entropy_threshold=5.1)
  spec = RewardSpec(segmentation, NORMALIZER, 'regression', tokenizer_fingerprint(str(reference)))
  write_spec(model, spec)
  base = str(reference) if is_adapter else ''
  lines = card_snippets.usage(str(model), 'scalar', True, base, _record(segmentation, reference))
  first, second = _blocks(lines)
  assert len([line for line in first.splitlines() if line]) <= 27
  names, printed = {}, io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(first, names)
  judge = segjax.load_reward_model(str(model), reference=str(reference))
  segments = judge.score([CHAT])[0].segments
  assert len(segments) > 3
  rows = [line.split(' score ')[-1] for line in printed.getvalue().splitlines()]
  theirs = [[float(number) for number in row.split(' normalised ')] for row in rows]
  ours = [(segment.score, segment.normalized_score) for segment in segments]
  np.testing.assert_allclose(theirs, ours, atol=1e-4)  # segjax rounds to four digits
  _check_server(second, names)


def _check_server(code, names):
  """Runs the code against a server of the local machine, which answers as vLLM does."""
  asked, scores = [], names['scores']

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      asked.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
      body = json.dumps({'data': [{'index': 0, 'data': [[score] for score in scores]}]}).encode()
      self.send_response(200)
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *arguments):
      pass

  with http.server.HTTPServer(('localhost', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names |= {'scores': None}
    exec(code.replace(':8000', f':{server.server_port}'), names)
    server.shutdown()
  assert names['scores'] == scores
  assert asked[0]['input'] == names['ids'][0].tolist() and asked[0]['use_activation'] is False


@pytest.mark.parametrize(
  'changes', [{'granularity': 'bandit'}, {'boundary': 'fixed_length'}, {'include_eos': True}]
)
def test_other_cuts_show_the_score_of_a_text(changes):
  segmentation = Segmentation(**changes)
  lines = card_snippets.usage('rm', 'scalar', True, '', _record(segmentation, 'sft'))
  (code,) = _blocks(lines)
  assert 'segment_reward.json' not in code and 'the score at the last token' in code
