"""Functions of the user's: loading by name, parameters that they may ask for, errors."""

import sys

import pytest

from segjax.errors import UserError
from segjax.train.user_functions import asked_by_name, load_function

LOAD = "give 'module:function'"


def test_load_function():
  assert load_function('math:sqrt', 'k')(4) == 2
  assert load_function('collections:OrderedDict.fromkeys', 'k')('a') == {'a': None}


@pytest.mark.parametrize(
  'path, message',
  [
    ('no.such.module:f', f"No module named 'no'.*{LOAD}"),
    ('math:no_such', f"has no attribute 'no_such'.*{LOAD}"),
    ('math', LOAD),
    ('math:', LOAD),
    (':sqrt', LOAD),
    ('', LOAD),
    ('math:pi', 'is a float and cannot be called'),
  ],
)
def test_load_function_names_the_key(path, message):
  with pytest.raises(ValueError, match=rf'^config\.reward_shaping\.reward_fn=.*{message}'):
    load_function(path, 'reward_shaping.reward_fn')


def test_a_module_that_fails_to_import(tmp_path, monkeypatch):
  (tmp_path / 'broken_module.py').write_text('def f(:\n')
  (tmp_path / 'raising_module.py').write_text('raise KeyError("x")\n')
  (tmp_path / 'exiting_module.py').write_text('raise SystemExit(1)\n')
  monkeypatch.syspath_prepend(tmp_path)
  modules = {'broken': SyntaxError, 'raising': KeyError, 'exiting': SystemExit}
  for name, cause in modules.items():
    with pytest.raises(ValueError, match=f'{name}.*{cause.__name__}.*{LOAD}') as caught:
      load_function(f'{name}_module:f', 'reward_shaping.reward_fn')
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(
  'parameters, message',
  [
    (
      'text',
      r'is called with \(prompt, response\) and, by name, any of row, messages, tokens, step',
    ),
    ('prompt, response, *, rubric', 'and takes other parameters .*rubric.*; define it with these'),
    ('prompt, response, extra', "and takes other parameters .*'extra'"),
    ('row, step', 'and takes other parameters'),
    ('prompt, response, row, /', "and takes other parameters .*'row'"),
  ],
)
def test_other_parameters_are_refused(tmp_path, monkeypatch, parameters, message):
  (tmp_path / 'odd_rules.py').write_text(f'def f({parameters}): return 1\n')
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'odd_rules', raising=False)
  with pytest.raises(
    UserError, match=rf"^config.evaluate.gold_reward_fn='odd_rules:f'.* {message}"
  ):
    load_function('odd_rules:f', 'evaluate.gold_reward_fn')
  assert load_function('odd_rules:f', 'another.key')


def test_parameters_that_are_asked_for_by_name():
  def some(prompt, response, tokens, *, step, row=None):
    pass

  def others(prompt, response, *tokens, weight=1.0, **step):
    pass

  assert asked_by_name(some) == ('row', 'tokens', 'step')
  assert asked_by_name(others) == asked_by_name(max) == ()
