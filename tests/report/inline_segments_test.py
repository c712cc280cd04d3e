"""Coloured segments of notebooks."""

import html
import re
from html.parser import HTMLParser

import pytest

import segjax
from segjax.errors import UserError
from segjax.evaluation.segment_records import AnnotatedResponse, Segment
from segjax.report import html_report, response_data
from segjax.report.inline_segments import show_segments


def _response(*segments):
  text = ''.join(segment.text for segment in segments)
  return AnnotatedResponse([{'role': 'user', 'content': '1 < 2?'}], text, list(segments))


def _segment(text, score=None, reward=None, normalized_score=None):
  tokens = re.findall(r'\s*\S+', text)
  return Segment(text, tokens, [0.5] * len(tokens), score, reward, normalized_score)


class _Texts(HTMLParser):
  """Collects the text of the coloured segments, with their classes, and what lies open."""

  def __init__(self):
    super().__init__()
    self.stack, self.texts = [], []

  def handle_starttag(self, tag, attributes):
    self.stack.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.stack.pop()[0] == tag

  def handle_data(self, data):
    self.texts.append((data, self.stack[-1][1] if self.stack else {}))


def _parse(shown):
  parser = _Texts()
  parser.feed(shown._repr_html_())
  assert not parser.stack
  return parser.texts


def test_a_segment_has_the_colour_of_the_number_that_report_html_shows():
  shown = show_segments(
    [
      _response(_segment('Good.', score=9.0, normalized_score=1.0), _segment(' Bad.', score=-2.0)),
      _response(_segment('Paid.', score=1.0, reward=-0.25, normalized_score=3.0)),
    ]
  )
  texts = _parse(shown)
  colours = {text: attributes for text, attributes in texts if 'style' in attributes}
  # Magnitudes 0.25, 1 and 2: int(0.95 * 2) = 1, so that 1 has the full colour.
  assert colours == {
    'Good.': {'class': 'segment up', 'style': '--size: 1.000'},
    'Bad.': {'class': 'segment down', 'style': '--size: 1.000'},
    'Paid.': {'class': 'segment down', 'style': '--size: 0.250'},
  }
  numbers = [text for text, attributes in texts if attributes.get('class') == 'value']
  assert numbers == ['+1.00', '-2.00', '-0.25']
  assert ' ' in [text for text, _ in texts]  # the space before Bad. has no colour


def test_entropies_where_there_are_no_scores():
  segment = Segment('A dog', ['A', ' dog'], [2.0, 0.5], None)
  texts = _parse(show_segments(_response(segment)))
  hot = {text: a['style'] for text, a in texts if a.get('class') == 'token hot'}
  assert hot == {'A': '--size: 1.000', ' dog': '--size: 0.250'}
  assert ('2.00', {'class': 'value'}) in texts


def test_unknown_numbers():
  texts = _parse(
    show_segments(_response(_segment('a', score=0.0), Segment('b', ['b'], [None], None)))
  )
  assert ('b', {'class': 'segment'}) in texts and (
    'a',
    {'class': 'segment up', 'style': '--size: 0.000'},
  ) in texts
  texts = _parse(show_segments(_response(Segment('b', ['b'], [None], None))))
  assert ('b', {'class': 'token'}) in texts
  assert ('no content', {'class': 'empty'}) in _parse(show_segments(_response()))


def test_text_of_a_model_is_no_markup():
  evil = '<script>alert(1)</script>"\x1b[2J'
  for score in (None, 1.0):
    shown = show_segments(_response(Segment(evil, [evil], [1.0], score)))
    page = shown._repr_html_()
    assert '<script' not in page and '\x1b' not in page
    assert html.escape('<script>alert(1)</script>"') in page
    assert '1 &lt; 2?' in page


def test_the_rules_are_those_of_the_report():
  style = show_segments([])._repr_html_()
  template = html_report._template()
  assert template['segments.css'] in style
  for name in ('pos', 'neg', 'entropy'):
    colour = re.search(rf'--{name}: (#\w+);', template['page.css'])[1]
    assert f'--{name}: {colour};' in style
  page = html_report.render(title='', responses=response_data.EncodedResponses('', 0, 0))
  assert template['segments.css'] in page


def test_other_values_are_named():
  with pytest.raises(UserError, match='show_segments got str; give what'):
    segjax.show_segments(['text'])
  assert repr(segjax.show_segments([])) == 'ColouredSegments(0 responses)'
