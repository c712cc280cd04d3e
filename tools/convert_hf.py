"""Converts checkpoints: import HF OUT, export CHECKPOINT OUT, merge ADAPTER OUT, verify, inspect.

Equals `segjax convert ...`; implemented in `segjax.hf`.
"""

import sys

from segjax.main import hide_unused_plugins

if __name__ == '__main__':
  hide_unused_plugins()
  from segjax.hf import cli

  sys.exit(cli.main(sys.argv[1:], 'convert_hf.py'))
