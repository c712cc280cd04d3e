"""Annotation of texts, against the networks and the slow loops; tools/show_segments.py."""

import base64
import gzip
import json
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.data.sources import load_rows
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.model.heads import token_logprobs
from segjax.rl import oracle
from segjax.run.scorers import load_annotator

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'show_segments.py'


@pytest.fixture
def annotator(language, small, one_device):
  """An annotator with an untrained network, whose entropies are high everywhere."""
  settings = small('sft', **{'reward_model.segmentation.entropy_threshold': 4.5})
  with jax.set_mesh(one_device):
    return load_annotator(language / 'model', None, settings, one_device, print)


@pytest.fixture
def texts(language):
  return list(annotate.read_texts(load_rows(str(language / 'rows' / 'pairs.jsonl.gz'), limit=5)))


@pytest.mark.campaign
def test_segments_equal_oracle(annotator, texts):
  tokenizer, texts = annotator.tokenizer, texts[:2]
  for (prompt, response), annotated in zip(
    texts, annotate.annotate(annotator, texts, batch_size=2), strict=True
  ):
    before = tokenizer.prompt_ids(prompt)
    ids = tokenizer.response_ids(prompt, response)
    _, entropy = token_logprobs(
      annotator.params['reference'], jnp.asarray([before + ids]), annotator.reference
    )
    entropy = np.asarray(entropy)[0, len(before) :]
    after = [*entropy[1:].tolist(), 0.0]  # the oracle reads the entropy of the next token
    ends = oracle.segment_ends(after, [True] * len(ids), True, 'segment', 4.5)
    begins = [0, *(end + 1 for end in ends)]
    spans = list(zip(begins, ends, strict=False))
    expected_texts = [tokenizer.decode(ids[b : e + 1]) for b, e in spans]
    assert [s.text.strip() for s in annotated.segments] == expected_texts
    assert ''.join(s.text for s in annotated.segments) == tokenizer.decode(ids)
    for segment, (begin, end) in zip(annotated.segments, spans, strict=True):
      np.testing.assert_allclose(segment.entropy, entropy[begin : end + 1], atol=2e-4)
      assert len(segment.tokens) == len(segment.entropy)
      assert segment.score is None and segment.normalized_score is None
    assert annotated.response == response and annotated.prompt == prompt


def test_batch_size_changes_nothing(annotator, texts):
  annotated = [list(annotate.annotate(annotator, texts, batch_size)) for batch_size in (1, 8)]
  for alone, together in zip(*annotated, strict=True):
    assert [s.text for s in alone.segments] == [s.text for s in together.segments]
    for a, b in zip(alone.segments, together.segments, strict=True):
      np.testing.assert_allclose(a.entropy, b.entropy, atol=2e-4)


def test_overlong_text_raises(annotator):
  with pytest.raises(
    UserError, match=r'text 2 has \d+ tokens, but the networks have 128 positions'
  ):
    list(annotate.annotate(annotator, [([], 'dull.'), ([], 'dull. ' * 200)]))


def test_row_without_an_answer_raises(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps({'messages': [{'role': 'user', 'content': 'hi'}]}))
  with pytest.raises(ValueError, match=r'rows.jsonl, row 1: the last message is not the assistant'):
    list(annotate.read_texts(load_rows(str(path))))


@pytest.fixture
def tool(monkeypatch, capsys):
  """Returns a function that runs the tool and returns what it prints."""
  monkeypatch.setattr(sys, 'path', list(sys.path))

  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['show_segments.py', *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name='__main__')
    return capsys.readouterr().out

  return run


def test_tool_escapes_control_characters(tool, language):
  text = '[bold]its \x1b[31m hearing'
  out = tool(language / 'model', f'--text={text}', '--granularity=bandit')
  assert 'segment' in out and 'entropy' in out
  assert '\x1b[31m' not in out


def test_tool_writes_every_row(tool, language, tmp_path):
  rows, out = language / 'rows' / 'pairs.jsonl.gz', tmp_path / 'scores.jsonl'
  html = tmp_path / 'segments.html'
  flags = ('--limit=3', f'--out={out}', f'--html={html}', '--granularity=token')
  printed = tool(language / 'model', rows, *flags)
  assert '3 texts in' in printed
  data = re.search(r'id="data">([^<]*)<', html.read_text())[1]
  assert len(json.loads(gzip.decompress(base64.b64decode(data)))) == 3
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  assert [line['response'] for line in lines] == [
    row['chosen'] for row in load_rows(str(rows), limit=3)
  ]
  assert all(len(s['tokens']) == 1 for line in lines for s in line['segments'])


def test_tool_needs_exactly_one_input(tool, capsys):
  with pytest.raises(SystemExit):
    tool('somewhere')
  assert 'either a file of rows or --text' in capsys.readouterr().err
  with pytest.raises(SystemExit, match=r'show_segments: .*nowhere'):
    tool('nowhere', '--text=a')
