"""The responses that a page can show: chosen evenly over the steps, packed for the browser."""

import base64
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax.report.response_log import FILE
from segjax.storage import scan_json_lines

BUDGET = 24 << 20  # bytes of lines read; gzip and base64 make about a quarter of them


class SampleLocation(NamedTuple):
  """Where a sample lies in a file; lines of one group are shown together or not at all."""

  path: Path
  offset: int
  size: int
  group: tuple[str, int]


class EncodedResponses(NamedTuple):
  """base64(gzip(JSON)) of the responses shown, how many these are, and how many there were."""

  data: str
  shown: int
  total: int


def of_run(directories: Sequence[Path], budget: int = BUDGET) -> EncodedResponses:
  """The samples of the stages in these directories, thinned to `budget` bytes of lines."""
  files = [d / FILE for d in directories if (d / FILE).exists()]
  found = [list(_lines(path)) for path in files]
  chosen = [thinned(lines, budget // len(files)) for lines in found]
  data = packed(_read(itertools.chain(*chosen)))
  return EncodedResponses(data, sum(map(len, chosen)), sum(map(len, found)))


def thinned(lines: Sequence[SampleLocation], budget: int) -> list[SampleLocation]:
  """Lines of at most `budget` bytes: whole groups, evenly over all; the first and last stay.

  A group that is too large by itself is cut short.
  """
  groups = [list(group) for _, group in itertools.groupby(sorted(lines, key=_group), key=_group)]
  chosen, count = groups, len(groups)
  while count > 1 and sum(line.size for group in chosen for line in group) > budget:
    count = max(1, min(count - 1, int(0.9 * count)))
    chosen = [groups[i] for i in np.linspace(0, len(groups) - 1, count).astype(int)]
  kept, left = [], budget
  for line in itertools.chain(*chosen):
    if line.size <= left:
      kept.append(line)
      left -= line.size
  return kept


def packed(samples: Iterable[dict[str, Any]]) -> str:
  """base64(gzip(JSON)) of a list of samples in short form."""
  rows = [_short(sample) for sample in samples]
  text = json.dumps(rows, separators=(',', ':'))
  return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _short(sample: dict[str, Any]) -> dict[str, Any]:
  """A sample with the names that page.js reads; its text is the sum of its tokens."""
  return {
    'stage': sample.get('stage', ''),
    'step': sample.get('step'),
    'model': sample.get('model', ''),
    'pair': sample.get('pair'),
    'threshold': sample.get('threshold'),
    'prompt': [[message['role'], message['content']] for message in sample['prompt']],
    'totals': sample.get('totals', {}),
    'segments': [
      [
        segment['tokens'],
        [None if x is None else round(x, 2) for x in segment['entropy']],
        segment['score'],
        segment['reward'],
      ]
      for segment in sample['segments']
    ],
  }


def _lines(path: Path) -> Iterator[SampleLocation]:
  for line in scan_json_lines(path):
    # Responses to compare stay together, and so do those of a step.
    pair = line.value.get('pair')
    group = ('step', line.value['step']) if pair is None else ('pair', pair)
    yield SampleLocation(path, line.offset, line.size, group)


def _group(line: SampleLocation) -> tuple[str, int]:
  return line.group


def _read(lines: Iterable[SampleLocation]) -> Iterator[dict[str, Any]]:
  for path, group in itertools.groupby(lines, key=lambda line: line.path):
    with path.open('rb') as file:
      for line in group:
        file.seek(line.offset)
        yield json.loads(file.read(line.size)) | {'stage': path.parent.name}
