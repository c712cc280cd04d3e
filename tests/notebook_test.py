"""tools/demo.ipynb: its cells run, and no outputs are stored."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segjax.config import parse

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = REPOSITORY / 'tools' / 'demo.ipynb'

# Runs the cells in the namespace of __main__, where a notebook's functions are; prints the value of
# a cell's last expression as a notebook would show it.
_RUN_CELLS = """
import ast, json, sys
for _cell in json.load(open(sys.argv[1], encoding='utf-8'))['cells']:
  if _cell['cell_type'] == 'code':
    _tree = ast.parse(''.join(_cell['source']))
    _last = _tree.body.pop() if isinstance(_tree.body[-1], ast.Expr) else None
    exec(compile(_tree, 'cell', 'exec'))
    if _last:
      _value = eval(compile(ast.Expression(_last.value), 'cell', 'eval'))
      if _value is not None:
        print('SHOWN', getattr(_value, '_repr_html_', _value.__repr__)(), flush=True)
"""

# A run so small that nearly all its time is compiling.
_TINY = {
  'network.hidden_size': 16,
  'network.intermediate_size': 32,
  'demo.sft_rows': 256,
  'demo.pairs': 256,
  'sft.max_steps': 2,
  'reward.max_steps': 2,
  'normalizer.max_pairs': 64,
  'ppo.max_steps': 1,
  'ppo.rollout_batch_size': 64,
  'evaluate.samples_per_prompt': 1,
}


def _cells():
  return json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']


def test_no_outputs_are_stored():
  code = [cell for cell in _cells() if cell['cell_type'] == 'code']
  assert len(code) >= 4
  for cell in code:
    assert cell['outputs'] == [] and cell['execution_count'] is None
    ast.parse(''.join(cell['source']))


def test_first_cell_tells_how_to_install_on_a_tpu():
  first, *_ = _cells()
  text = ''.join(first['source'])
  assert first['cell_type'] == 'markdown'
  assert all(word in text for word in ('Kaggle', 'Colab', "'jax[tpu]'", 'pip install'))


def test_its_settings_exist():
  for cell in _cells():
    for node in ast.walk(ast.parse(''.join(cell['source']))) if cell['cell_type'] == 'code' else ():
      for key in node.keys if isinstance(node, ast.Dict) else ():
        if isinstance(key, ast.Constant) and '.' in key.value:
          parse.check_key(key.value)


@pytest.mark.campaign
def test_cells_run(tmp_path):
  environment = os.environ | {
    'SEGJAX_DEMO_RUN': str(tmp_path / 'run'),
    'SEGJAX_DEMO_OVERRIDES': json.dumps(_TINY),
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  command = [sys.executable, '-c', _RUN_CELLS, str(NOTEBOOK)]
  done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
  assert done.returncode == 0, done.stderr
  results, scored, entropies = (text.strip() for text in done.stdout.split('SHOWN ')[1:])
  assert results.startswith("{'reward': ")
  for shown in (scored, entropies):
    assert shown.count('<div class="text">') == 4
  assert 'class="segment up"' in scored or 'class="segment down"' in scored
  assert 'class="token hot"' in entropies
  assert (tmp_path / 'run' / 'report.html').exists()
  assert (tmp_path / 'run-own' / 'ppo' / 'model' / 'model.safetensors').exists()
  assert 0 <= float(done.stdout.rpartition('reward ')[2].split()[0]) <= 1
