"""Every metric is explained once; README's table is the glossary."""

from pathlib import Path

from segjax.report import metric_docs

README = Path(__file__).parents[2] / 'README.md'


def test_readme_has_the_table():
  text = README.read_text(encoding='utf-8')
  assert metric_docs.markdown() in text, 'put the output of glossary.markdown() under ## Metrics'


def test_names_are_unique_and_found():
  names = [name for entry in metric_docs.ENTRIES for name in entry.names]
  assert len(names) == len(set(names))
  for entry in metric_docs.ENTRIES:
    assert all(metric_docs.find_entry(name) is entry for name in entry.names)
    assert entry.meaning


def test_patterns_stand_for_all_that_fit():
  assert 'tenth' in metric_docs.find_entry('reward/by_position/7').meaning
  assert 'gradient' in metric_docs.find_entry('critic/grad_norm').meaning
  assert metric_docs.find_entry('reward/segmentmean') is None
