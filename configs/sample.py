"""Several responses to each prompt, and the best of them as rows for sft.

  python -m segjax.main --config=configs/sample.py --workdir=runs/mine \\
    --config.policy.path=SFT_MODEL --config.reward_model.path=REWARD_MODEL \\
    --config.data.path=PROMPTS --config.sample.samples_per_prompt=8

`sample/responses.jsonl` has them all; `sample/best.jsonl` is what
`segjax sft:local --config.data.path=runs/mine/sample/best.jsonl` trains on (rejection sampling).
With `--config.sample.search=segment` each segment is the best of samples_per_prompt, and there is
one response to a prompt.
"""

from ml_collections import ConfigDict

from configs.shared import local_run
from segjax.config import presets


def get_config() -> ConfigDict:
  """Returns the settings of the job."""
  config = presets.default_config()
  config.stages = ('sample',)
  local_run.assign(config)
  return config
