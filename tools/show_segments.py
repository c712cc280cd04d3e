"""Where a policy's entropy cuts texts, and what a reward model gives each segment.

  python tools/show_segments.py POLICY --text='Once upon a time, there was a dog.'
  python tools/show_segments.py POLICY rows.jsonl --reward_model=REWARD --out=scores.jsonl
  python tools/show_segments.py POLICY rows.jsonl --reward_model=REWARD --html=segments.html

POLICY and REWARD are HF directories or hub ids; rows are conversations (`messages`), or preferences
(`chosen`), as .jsonl, .jsonl.gz, .parquet or a hub id. The policy alone shows entropies and cuts.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segjax.config import settings as typed
from segjax.config.settings import Settings


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('policy')
  parser.add_argument('rows', nargs='?', default='')
  parser.add_argument('--text', help='plain text, without a chat template')
  parser.add_argument('--reward_model', default='')
  parser.add_argument('--threshold', type=float, help='nats; default: as stored, or 2')
  parser.add_argument('--granularity', choices=['segment', 'token', 'bandit'])
  parser.add_argument('--chat_template', default='', help="in place of the tokenizer's own")
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--batch', type=int, default=8, help='texts at once')
  parser.add_argument('--limit', type=int, default=0, help='texts at most; 0 for all')
  parser.add_argument('--html', type=Path, help='writes a page there that shows them in colour')
  parser.add_argument('--out', type=Path, help='writes JSON lines there in place of the table')
  flags = parser.parse_args()
  if bool(flags.rows) == (flags.text is not None):
    parser.error('give either a file of rows or --text')
  return flags


def main() -> None:
  """Shows or writes the segments of all texts."""
  flags = parse()
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  from segjax.data.sources import load_rows
  from segjax.evaluation import annotate
  from segjax.model.mesh import make_mesh
  from segjax.report import html_report, segment_table

  named = {
    'policy.path': flags.policy,
    'reward_model.path': flags.reward_model,
    'runtime.compute_dtype': flags.dtype,
    'data.chat_template': flags.chat_template or (annotate.PLAIN if flags.text is not None else ''),
  }
  if flags.threshold is not None:
    named['reward_model.segmentation.entropy_threshold'] = flags.threshold
  if flags.granularity:
    named['reward_model.segmentation.granularity'] = flags.granularity
  mesh = make_mesh()
  stage = annotate.stage_of('segments', typed.replace(Settings(), **named), mesh)
  texts = [([], flags.text)]
  if flags.rows:
    texts = list(annotate.of_rows(load_rows(flags.rows, 'train', flags.limit)))
  reader = annotate.load(stage)
  found = annotate.annotate(stage, reader, texts, flags.batch)
  if flags.html:
    found = list(found)
    html_report.write_responses(flags.html, flags.html.stem, found)
    print(f'{len(texts)} texts in {flags.html}')
    if not flags.out:
      return
  if not flags.out:
    for one in found:
      segment_table.print_segments(one)
    return
  with flags.out.open('w', encoding='utf-8') as out:
    for one in found:
      out.write(json.dumps(one.as_json(), ensure_ascii=False) + '\n')
  print(f'{len(texts)} texts in {flags.out}')


if __name__ == '__main__':
  try:
    main()
  except (ValueError, OSError) as error:
    raise SystemExit(f'show_segments: {error}') from None
