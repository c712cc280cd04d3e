"""Converts checkpoints: import HF OUT, export CHECKPOINT OUT, verify HF [CHECKPOINT], inspect HF.

Equals `segjax convert ...`; implemented in `segjax.hf`.
"""

import sys

from segjax.hf import cli

if __name__ == '__main__':
  sys.exit(cli.main(sys.argv[1:], 'convert_hf.py'))
