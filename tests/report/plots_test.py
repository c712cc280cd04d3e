"""Curves, histograms and fits as SVG in the page's colours, and curves as PNG for a model card."""

import io
import json
import logging
from xml.etree import ElementTree

import numpy as np
import pytest

from segjax.report import charts, plots, thinning


def test_a_downsampled_curve_keeps_its_spikes():
  y = np.sin(np.arange(10_000) / 900)
  y[4321], y[7], y[17] = 50.0, -50.0, np.nan
  steps, values = thinning.downsample(np.arange(10_000), y)
  assert len(steps) <= thinning.MAX_POINTS
  assert values.max() == 50 and values.min() == -50
  assert (np.diff(steps) > 0).all() and np.isfinite(values).all()


@pytest.mark.parametrize('y', [[], [1.0], [float('nan')], [0.0, 0.0]], ids=str)
def test_short_curves_are_drawn_completely(y):
  svg = plots.curve(range(len(y)), {'a': y}, 'one & <two>').svg
  root = ElementTree.fromstring(svg)
  assert root.attrib['aria-label'] == 'one & <two>'
  assert len(thinning.downsample(range(len(y)), y)[0]) == sum(x == x for x in y)


def test_the_running_mean_equals_a_loop():
  y = np.random.default_rng(0).normal(size=30)
  expected = [y[max(0, i - 3) : i + 4].mean() for i in range(30)]
  np.testing.assert_allclose(thinning.running_mean(y, 6), expected, atol=1e-12)  # float64 sums


def test_svgs_have_the_colours_of_the_page():
  bins = {'p': [0.5, 1], 'count': [1, 2], 'mean': [0.1, 0.2]}
  for drawing in (
    plots.curve(range(100), {'a': range(100), 'b': range(100)}, 'x'),
    plots.stacked([0, 1], {'a': [1, 2], 'b': [1, float('nan')]}, 'x'),
    plots.histogram([0.5, 1, 3], 'x', 'nats', mark=2.0),
    plots.histogram([], 'x', 'tokens', integers=True),
    plots.fit(bins, 'mean', 0.1, 0.2, 'x'),
  ):
    svg = drawing.svg
    assert '#0000' not in svg and 'var(--' in svg and '<metadata' not in svg


def _write_metric(path, values, name='loss'):
  path.write_text(''.join(json.dumps({'step': k, name: v}) + '\n' for k, v in enumerate(values)))
  return path


def _pixels(png):
  from matplotlib import image

  return image.imread(io.BytesIO(png))


def test_a_card_has_a_panel_for_each_metric(tmp_path):
  lines = [{'step': k, 'loss': 1 / (k + 1), 'objective/kl': k, 'seconds': 9} for k in range(5)]
  path = tmp_path / 'metrics.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 5, "lo')  # a torn line
  one, two = (
    _pixels(charts.card_png(path, names)) for names in (['loss'], ['loss', 'objective/kl'])
  )
  assert two.shape[1] == 2 * one.shape[1] and two.shape[0] == one.shape[0]
  assert _pixels(charts.card_png(path, ['loss', 'not there'])).shape == one.shape


def test_the_same_lines_give_the_same_bytes(tmp_path):
  path = _write_metric(tmp_path / 'metrics.jsonl', [3, 2, 1])
  before = charts.card_png(path, ['loss'])
  assert charts.card_png(path, ['loss']) == before
  assert charts.card_png(_write_metric(path, [3, 2, 2]), ['loss']) != before


@pytest.mark.parametrize('values', [[1.0], ['nan', 'inf'], [1, 'nan', 2], [0.0] * 700])
def test_edge_cases_of_values_are_drawn(tmp_path, values):
  path = _write_metric(tmp_path / 'm', values, 'a$_{b')
  assert charts.card_png(path, ['a$_{b']).startswith(b'\x89PNG')


def test_a_card_without_metrics_has_no_png(tmp_path):
  assert charts.card_png(tmp_path / 'missing.jsonl', ['loss']) == b''
  assert charts.card_png(_write_metric(tmp_path / 'm', [1, 2]), ['other']) == b''
  assert charts.card_png(_write_metric(tmp_path / 'm', []), ['loss']) == b''


def test_drawing_restores_the_log_level(tmp_path):
  logger = logging.getLogger('matplotlib')
  before = logger.level
  charts.card_png(_write_metric(tmp_path / 'm', [1, 2]), ['loss'])
  assert logger.level == before
