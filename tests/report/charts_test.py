"""Charts of files that a person may have edited."""

import pytest

from segjax.report import charts


@pytest.mark.parametrize(
  'text', ['[]', '{', '{"bins": 3, "coefficients": {}}', '{"bins": {}, "coefficients": []}']
)
def test_an_edited_normalizer_has_no_chart(tmp_path, text):
  (tmp_path / 'normalizer.json').write_text(text)
  assert not charts.stage_charts(tmp_path).main


def test_lines_without_a_step_are_left_out(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "a": 1}\n{"a": 2}\n{"step": "x"}\n3\n')
  assert charts.read_metrics(tmp_path / 'metrics.jsonl') == ([1], {'a': [1.0]})
