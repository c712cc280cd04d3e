"""Reference text of `segjax help rewards`."""

REWARDS = """\
config.rewards adds reward models and functions to reward_model.path and reward_shaping.reward_fn,
one by a line 'NAME KEY=VALUE ...'; lines are joined by commas on the command line:

  --config.rewards='second path=DIR weight=0.5 granularity=token,brief fn=mine:brief weight=0.1'

  path          HF directory, adapter or hub id of a reward model with the policy's tokenizer.
                Adapters on the base of the reference are scored in one pass with it.
  fn            'module:function', called as reward_fn is (`segjax help functions`), with its
                settings of concurrency, time limit, retries and errors
  weight        factor in the sum, 1 by default; 0 of a model watches its disagreement alone. Those
                of the first ones are reward_shaping.reward_model_weight and reward_fn_weight.
  normalizer    none or published:NAME; granularity, boundary, entropy_threshold, segment_length,
                min_segment_length, aggregation and spread, of a reward model: its own density. What
                is left out is that of its segment_reward.json, where it has none of
                config.reward_model, and of reward_shaping.spread.

  reward_shaping.mix=token     each model is read at its own segments, normalised, spread and
                               weighted; the rewards of a token add up
  reward_shaping.mix=segment   all models are read at the segments of the first one and their
                               weighted, normalised scores z add up; the sum is spread once
  reward_shaping.disagreement_coef=c
                               with mix=segment: z of a segment is Σ w_i z_i − c · Σ w_i · s, where
                               s is the standard deviation of z_i over the models. With weights of
                               1/n: the ensemble's mean minus c times its spread, against
                               over-optimisation (https://arxiv.org/abs/2310.02743).

reward/part/NAME is what a source adds to a response, before penalties and KL; reward_model,
reward_fn, lm_reward and disagreement are parts, too. reward/disagreement is the mean of s over
segments. The page of a run shows the parts of each segment under the pointer, and their sums above
each response; samples.jsonl, sample/responses.jsonl, results.json of evaluate and /segments in chat
have them, too. In a study, 'ARM rewards=NAME+NAME' takes these lines of config.rewards alone, and
'ARM rewards=none' takes none.
"""
