"""Converts checkpoints: import HF OUT, export CHECKPOINT OUT, verify HF [CHECKPOINT], inspect HF.

The same as `segjax convert ...`; the work is in `segjax.hf`.
"""

import sys

from segjax.hf import command

if __name__ == '__main__':
  sys.exit(command.main(sys.argv[1:], 'convert_hf.py'))
