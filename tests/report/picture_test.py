"""The picture of a stage's metrics."""

import io
import json
import logging

import pytest

from segjax.report import picture


def _log(path, values, name='loss'):
  path.write_text(''.join(json.dumps({'step': k, name: v}) + '\n' for k, v in enumerate(values)))
  return path


def _pixels(png):
  from matplotlib import image

  return image.imread(io.BytesIO(png))


def test_one_panel_for_each_metric_there_is(tmp_path):
  lines = [{'step': k, 'loss': 1 / (k + 1), 'objective/kl': k, 'seconds': 9} for k in range(5)]
  path = tmp_path / 'metrics.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 5, "lo')  # a killed process's end
  one, two = (_pixels(picture.png(path, names)) for names in (['loss'], ['loss', 'objective/kl']))
  assert two.shape[1] == 2 * one.shape[1] and two.shape[0] == one.shape[0]
  assert _pixels(picture.png(path, ['loss', 'not there'])).shape == one.shape


def test_the_same_lines_give_the_same_bytes(tmp_path):
  path = _log(tmp_path / 'metrics.jsonl', [3, 2, 1])
  assert picture.png(path, ['loss']) == picture.png(path, ['loss'])
  before = picture.png(path, ['loss'])
  assert picture.png(_log(path, [3, 2, 2]), ['loss']) != before


@pytest.mark.parametrize('values', [[1.0], ['nan', 'inf'], [1, 'nan', 2], [0.0] * 700])
def test_hard_values_are_drawn(tmp_path, values):
  assert picture.png(_log(tmp_path / 'm', values, 'a$_{b'), ['a$_{b']).startswith(b'\x89PNG')


def test_nothing_to_draw(tmp_path):
  assert picture.png(tmp_path / 'missing.jsonl', ['loss']) == b''
  assert picture.png(_log(tmp_path / 'm', [1, 2]), ['other']) == b''
  assert picture.png(_log(tmp_path / 'm', []), ['loss']) == b''


def test_logging_is_as_before(tmp_path):
  logger = logging.getLogger('matplotlib')
  before = logger.level
  picture.png(_log(tmp_path / 'm', [1, 2]), ['loss'])
  assert logger.level == before
