"""Plans a run without its devices: memory and time of each phase.

The same as `segjax plan ...`; the work is in `segjax.plan`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segjax import main

if __name__ == '__main__':
  main.run(main.plan_command())
