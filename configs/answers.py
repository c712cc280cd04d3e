"""Answers to the questions of a public judge, in the format of the judge's tool.

  python -m segjax.main --config=configs/answers.py --config.policy.path=CHECKPOINT \\
    --config.data.path=QUESTIONS

QUESTIONS is a file or hub id of AlpacaEval, MT-Bench or Arena-Hard v0.1 in its published form.
Answers are greedy unless config.rollout.temperature is set; with
`--config.answers.category_temperatures=True` MT-Bench's temperatures by category are used.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config() -> ConfigDict:
  """Returns the settings of the job."""
  config = presets.default_config()
  config.stages = ('answers',)
  config.rollout.temperature = 0.0
  config.rollout.max_new_tokens = 1024
  return config
