"""Errors as one line of text."""

from segjax.errors import first_line


def test_the_first_line_of_an_error():
  assert first_line(OSError(' disk full\nat 0x7f')) == 'disk full'
  assert first_line(OSError()) == 'OSError' and len(first_line(OSError('x' * 999))) == 300
