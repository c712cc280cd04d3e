"""Answers to the questions of a public judge, in the form that the judge's tool reads.

  python -m segjax.main --config=configs/answers.py --config.policy.path=CHECKPOINT \\
    --config.data.path=QUESTIONS

QUESTIONS is a file or hub id of AlpacaEval, MT-Bench or Arena-Hard v0.1 in its published form.
Answers are greedy unless config.rollout says otherwise; MT-Bench's own temperatures by category are
`--config.answers.category_temperatures=True`.
"""

from ml_collections import ConfigDict

from segjax.config import presets


def get_config(preset: str = 'default') -> ConfigDict:
  """The settings; there are no presets."""
  presets.parse_preset(preset, ('default',))
  config = presets.default_config()
  config.stages = ('answers',)
  config.rollout.temperature = 0.0
  config.rollout.max_new_tokens = 1024
  return config
