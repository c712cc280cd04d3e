"""Every metric is explained once; README's table is the glossary."""

from pathlib import Path

from segjax.report import glossary

README = Path(__file__).parents[2] / 'README.md'


def test_readme_has_the_table():
  text = README.read_text(encoding='utf-8')
  assert glossary.markdown() in text, 'put the output of glossary.markdown() under ## Metrics'


def test_names_are_unique_and_found():
  names = [name for entry in glossary.ENTRIES for name in entry.names]
  assert len(names) == len(set(names))
  for entry in glossary.ENTRIES:
    assert all(glossary.explained(name) is entry for name in entry.names)
    assert entry.meaning


def test_patterns_stand_for_all_that_fit():
  assert 'tenth' in glossary.explained('reward/z_by_position/7').meaning
  assert 'gradient' in glossary.explained('val/grad_norm').meaning
  assert glossary.explained('reward/segmentmean') is None
