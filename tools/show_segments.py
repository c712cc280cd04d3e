"""Segments texts by the entropy of a reference, and scores the segments by a reward model.

  python tools/show_segments.py REFERENCE --text='Once upon a time, there was a dog.'
  python tools/show_segments.py REFERENCE rows.jsonl --reward_model=REWARD --out=scores.jsonl
  python tools/show_segments.py REFERENCE rows.jsonl --reward_model=REWARD --html=segments.html

REFERENCE and REWARD are HF directories or hub ids; rows are conversations (`messages`), or
preferences (`chosen`), as .jsonl, .jsonl.gz, .parquet or a hub id. Without a reward model the
segments have entropies, but no scores.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segjax.config import settings as typed
from segjax.config.settings import Settings
from segjax.main import hide_unused_plugins


def parse() -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('reference')
  parser.add_argument('rows', nargs='?', default='')
  parser.add_argument('--text', help='plain text, without a chat template')
  parser.add_argument('--reward_model', default='')
  parser.add_argument('--threshold', type=float, help='nats; default: as stored, or 2')
  parser.add_argument('--granularity', choices=['segment', 'token', 'bandit'])
  parser.add_argument('--chat_template', default='', help="replaces the tokenizer's own")
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--batch', type=int, default=8, help='texts per batch')
  parser.add_argument('--limit', type=int, default=0, help='maximum number of texts; 0 for all')
  parser.add_argument('--html', type=Path, help='write a page that shows the segments in colour')
  parser.add_argument('--out', type=Path, help='write JSON lines instead of the table')
  flags = parser.parse_args()
  if bool(flags.rows) == (flags.text is not None):
    parser.error('give either a file of rows or --text')
  return flags


def main() -> None:
  """Prints or writes the segments of all texts."""
  flags = parse()
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  hide_unused_plugins()
  from segjax.data.sources import load_rows
  from segjax.evaluation import annotate
  from segjax.hf.reader import resolve_checkpoint
  from segjax.model.mesh import make_mesh
  from segjax.report import html_report, segment_table
  from segjax.report.console import log
  from segjax.run.scorers import load_annotator

  plain = '' if flags.text is None else annotate.PLAIN_TEMPLATE
  overrides = {
    'runtime.compute_dtype': flags.dtype,
    'data.chat_template': flags.chat_template or plain,
  }
  if flags.threshold is not None:
    overrides['reward_model.segmentation.entropy_threshold'] = flags.threshold
  if flags.granularity:
    overrides['reward_model.segmentation.granularity'] = flags.granularity
  mesh = make_mesh()
  settings = typed.replace(Settings(), **overrides)
  texts = [([], flags.text)]
  if flags.rows:
    texts = list(annotate.read_texts(load_rows(flags.rows, 'train', flags.limit)))
  reward = resolve_checkpoint(flags.reward_model) if flags.reward_model else None
  annotator = load_annotator(resolve_checkpoint(flags.reference), reward, settings, mesh, log)
  responses = annotate.annotate(annotator, texts, flags.batch)
  if flags.html:
    responses = list(responses)
    html_report.write_responses(flags.html, flags.html.stem, responses)
    print(f'{len(texts)} texts in {flags.html}')
    if not flags.out:
      return
  if not flags.out:
    for response in responses:
      segment_table.print_segments(response)
    return
  with flags.out.open('w', encoding='utf-8') as out:
    for response in responses:
      out.write(json.dumps(response.as_json(), ensure_ascii=False) + '\n')
  print(f'{len(texts)} texts in {flags.out}')


if __name__ == '__main__':
  try:
    main()
  except (ValueError, OSError) as error:
    raise SystemExit(f'show_segments: {error}') from None
