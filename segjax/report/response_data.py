"""Selects the responses that report.html shows, and encodes them for the browser."""

import base64
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax.report import stage_history
from segjax.report.metric_names import stage_name
from segjax.report.response_log import RESPONSES_FILE
from segjax.storage import scan_json_lines

MAX_BYTES = 24 << 20  # of lines read; gzip and base64 reduce them to about a quarter


class SampleLocation(NamedTuple):
  """The location of a response in a file; the lines of a group are shown together or not at all."""

  path: Path
  offset: int
  size: int
  group: tuple[str, int]


class EncodedResponses(NamedTuple):
  """base64(gzip(JSON)) of the responses shown, their number, and the number logged."""

  data: str
  shown: int
  total: int


def collect_responses(directories: Sequence[Path], max_bytes: int = MAX_BYTES) -> EncodedResponses:
  """Encodes the responses of the stages in these directories, downsampled to `max_bytes`."""
  paths = [d / RESPONSES_FILE for d in directories if (d / RESPONSES_FILE).exists()]
  locations = [list(_locations(path)) for path in paths]
  selected = [downsample(lines, max_bytes // len(paths)) for lines in locations]
  data = encode(_load(itertools.chain(*selected)))
  return EncodedResponses(data, sum(map(len, selected)), sum(map(len, locations)))


def downsample(lines: Sequence[SampleLocation], max_bytes: int) -> list[SampleLocation]:
  """Selects lines of at most `max_bytes`: complete groups, evenly spaced, with the first and last.

  A single group that is too large is truncated.
  """
  groups = [list(group) for _, group in itertools.groupby(sorted(lines, key=_group), key=_group)]
  selected, count = groups, len(groups)
  while count > 1 and sum(line.size for group in selected for line in group) > max_bytes:
    count = max(1, min(count - 1, int(0.9 * count)))
    selected = [groups[i] for i in np.linspace(0, len(groups) - 1, count).astype(int)]
  result, remaining = [], max_bytes
  for line in itertools.chain(*selected):
    if line.size <= remaining:
      result.append(line)
      remaining -= line.size
  return result


def encode(records: Iterable[dict[str, Any]]) -> str:
  """Returns base64(gzip(JSON)) of response records, in the compact form that page.js reads."""
  return compress([_compact(record) for record in records])


def compress(value: Any) -> str:
  """Returns base64(gzip(JSON)) of a value, which page.js decodes; numbers not finite are null."""
  try:
    text = json.dumps(value, separators=(',', ':'), allow_nan=False)
  except ValueError:  # a browser reads no NaN
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(finite, separators=(',', ':'))
  return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _compact(record: dict[str, Any]) -> dict[str, Any]:
  """Returns a record without its segments' texts, which are the concatenation of their tokens."""
  return {
    'stage': record.get('stage', ''),
    'step': record.get('step'),
    'model': record.get('model', ''),
    'pair': record.get('pair'),
    'threshold': record.get('threshold'),
    'prompt': [[message['role'], message['content']] for message in record['prompt']],
    'totals': record.get('totals', {}),
    'reward': record.get('reward_name', 'reward'),
    'segments': [
      [
        segment['tokens'],
        [None if x is None else round(x, 2) for x in segment['entropy']],
        segment['score'],
        segment['reward'],
        segment.get('normalized_score'),
        segment.get('parts'),
      ]
      for segment in record['segments']
    ],
  }


def _locations(path: Path) -> Iterator[SampleLocation]:
  for line in scan_json_lines(path):
    # Responses to compare stay together, and so do those of a step.
    pair = line.value.get('pair')
    group = ('step', line.value['step']) if pair is None else ('pair', pair)
    yield SampleLocation(path, line.offset, line.size, group)


def _group(line: SampleLocation) -> tuple[str, int]:
  return line.group


def _load(lines: Iterable[SampleLocation]) -> Iterator[dict[str, Any]]:
  for path, group in itertools.groupby(lines, key=lambda line: line.path):
    names = {'stage': stage_name(path.parent.name), 'reward_name': _reward_name(path.parent)}
    with path.open('rb') as file:
      for line in group:
        file.seek(line.offset)
        yield json.loads(file.read(line.size)) | names


def _reward_name(directory: Path) -> str:
  """Returns what the rewards of a stage's responses are, by its settings."""
  settings = stage_history.load_stage(directory).get('key', {}).get('settings', {})
  placement = settings.get('ppo', {}).get('kl_placement')
  return {'reward': 'reward after KL', 'loss': 'reward before KL'}.get(placement, 'reward')
