"""Studies: arms of settings, compared over seeds at equal KL.

  python -m segjax.main --config=configs/study.py:granularity --workdir=runs/study \\
    --config.study.jobs=2

Presets: granularity, normalizer, spread, threshold, redistribution, estimator, all, credit. The
first compares rewards for segments, tokens and whole responses, with controls; the next ones change
one part of the method; credit is configs/credit.py, which trains no policy.

First each arm tries the same constants on seeds that are not shown (study/tuning.json;
`--config.study.trials=0` leaves it out). Each cell, an arm on a seed, is an ordinary run in runs/,
and what arms share is made once. Finished runs are kept: the same command goes on where it was
stopped, and more seeds or arms cost only their own cells. study/table.md has the comparison, and
narrows as cells come in. Dense rewards may lose in other languages:
`--config.study.languages=requests,delayed,bifurcation`.

An arm of one's own is a line in a config file that starts from this one:
`config.study.arms += ('gentle ppo.kl_coef=1',)`. Good practice: Agarwal et al. 2021,
https://arxiv.org/abs/2108.13264. On a GPU, several runs need XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

from ml_collections import ConfigDict

from configs import credit
from configs.shared import demo_run, study_arms
from segjax.config import presets


def get_config(preset: str = 'granularity') -> ConfigDict:
  """Returns the settings of a study."""
  name = presets.parse_preset(preset, (*study_arms.ARMS, 'credit')).name
  if name == 'credit':
    return credit.get_config()
  config = presets.default_config()
  demo_run.assign(config, last_job='evaluate')
  config.stages = ('study',)
  config.study.arms = study_arms.ARMS[name]
  config.study.grid = study_arms.GRID
  config.study.trials = 4
  # The best policy of requests is 3.8 nats away from its writer: what it says, the writer says in
  # exp(-3.8) of its responses. Beyond, KL is a cost alone.
  config.study.kl_levels = ('2', '4', '8', '12')
  config.study.main_level = '4'
  config.study.seeds = ('0:9',) if name == 'granularity' else ('0:4',)
  config.sft.max_steps = 400  # contents are looked up in the prompt, which takes longer to learn
  config.ppo.max_steps = 30
  config.ppo.eval_every = 3  # points of the curve of gold over KL
  config.ppo.holdout_fraction = 0.25
  config.evaluate.credit_fn = 'segjax.data.languages:true_credit'
  config.evaluate.samples_per_prompt = 4  # of 144 prompts
  config.evaluate.num_printed = 0
  return config
