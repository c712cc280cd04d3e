"""Converts checkpoints: `import HF OUT`, `export CHECKPOINT OUT`, `inspect HF`.

Flags only; the logic is in `segjax.hf.convert`.
"""

import argparse
import sys

from segjax.hf import convert


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='HF checkpoints to and from Orbax.')
  commands = parser.add_subparsers(dest='command', required=True)
  command = commands.add_parser('import', help='HF checkpoint to Orbax')
  command.add_argument('source', help='directory or hub id')
  command.add_argument('out')
  command.add_argument('--head', choices=('language', 'scalar'), default='language')
  command.add_argument('--dtype', default='', help="of the parameters; the file's by default")
  command.add_argument('--seed', type=int, default=0, help='for a scalar head not in the source')
  command = commands.add_parser('export', help='imported checkpoint to HF')
  command.add_argument('checkpoint')
  command.add_argument('out')
  command.add_argument('--dtype', default='', help="of the files; the parameters' by default")
  command = commands.add_parser('inspect', help='print names, shapes, dtypes')
  command.add_argument('source', help='directory or hub id')
  return parser.parse_args()


def main() -> None:
  """Runs the command; a ValueError is for the user to read, without a traceback."""
  flags = _arguments()
  try:
    if flags.command == 'import':
      print(
        convert.import_checkpoint(
          flags.source, flags.out, head=flags.head, dtype=flags.dtype, seed=flags.seed
        )
      )
    elif flags.command == 'export':
      print(convert.export_checkpoint(flags.checkpoint, flags.out, dtype=flags.dtype))
    else:
      print(convert.inspect_checkpoint(flags.source))
  except ValueError as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  main()
