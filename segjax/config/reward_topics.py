"""Reference texts of `segjax help` about rewards: functions, several at once, models of others."""

FUNCTIONS = """\
reward_shaping.reward_fn and evaluate.gold_reward_fn name a function, 'module:function', which is
called with (prompt, response): the prompt's last message and the response, as text. It also gets
what it has a parameter for, by name:

  row        the columns of the row of data, as in row['answer']; data.columns renames them
  messages   the whole prompt: [{role, content}, ...]
  tokens     the text that each token adds; they join to the response
  step       number of the training step, from 0; None outside of training

reward_fn returns a number, earned at the last token; one number per token; or [(end, value), ...],
earned by the text up to character `end`. gold_reward_fn returns a number. Ready ones, which read
row['answer'], row['pattern'], row['max_words'], row['script'] or the text alone, are
segjax.verifiers:exact_answer, numeric_answer (as in GSM8K), regular_expression, valid_json,
word_limit, script and same_script.

  name_batch          is called once, with lists in place of prompt, response, row, messages and
                      tokens, and returns a list
  async def           runs on an event loop, reward_shaping.reward_fn_concurrency calls at once
  any other           is called in turn, or in threads with reward_fn_concurrency above 1 or a time
                      limit. A thread past its limit goes on: limit the client of a service, too.
  a call that fails   or takes longer than reward_shaping.reward_fn_timeout seconds is repeated
                      reward_fn_retries times, after 1, 2, 4, ... seconds. Then the run ends in one
                      line with the prompt; with reward_fn_on_error=zero the response has no such
                      reward, and reward/failed_calls counts it. A gold reward always ends the run.

Of several hosts the first one calls, once for each response; the others wait for its results.
Several such functions, and reward models beside them: `segjax help rewards`.
"""

REWARDS = """\
config.rewards adds reward models and functions to reward_model.path and reward_shaping.reward_fn,
one by a line 'NAME KEY=VALUE ...'; lines are joined by commas on the command line:

  --config.rewards='second path=DIR weight=0.5 granularity=token,brief fn=mine:brief weight=0.1'

  path          HF directory, adapter or hub id of a reward model. One of another tokenizer or chat
                template than the policy's reads text; adapters on the base of the reference are
                scored in one pass with it.
  fn            'module:function', called as reward_fn is (`segjax help functions`), with its
                settings of concurrency, time limit, retries and errors
  weight        factor in the sum, 1 by default; 0 of a model watches its disagreement alone. Those
                of the first ones are reward_shaping.reward_model_weight and reward_fn_weight.
  reads, head, positive, negative, step_tag, step_delimiter
                how its score is read, as in reward_model: `segjax help reward-models`
  normalizer    none or published:NAME; granularity, boundary, entropy_threshold, segment_length,
                delimiters, min_segment_length, aggregation and spread, of a reward model: its own
                density. What is left out is that of its segment_reward.json, where it has none of
                config.reward_model, and of reward_shaping.spread.

A value in quotes is read as in Python: step_tag=' ки' step_delimiter='\\n'; ',' is '\\x2c'.

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

REWARD_MODELS = """\
All jobs read reward models of others, as the API does: load_reward_model(..., head=).
Without a segment_reward.json, set reward_model.segmentation.granularity, boundary, ..., and
reward_model.normalizer, or fit one by the normalizer job, which writes that file.

  text      A model of another tokenizer or chat template than the policy's reads text, by its own:
            responses are cut on the policy's tokens, and an end is carried over in characters, to
            the token that completes them. reward_model.reads sets it. A normaliser carries over, as
            its position p counts segments; an entropy threshold is that of another reference.
  rows      normalizer and evaluate_reward cut responses of data on the tokens of reference.path, as
            ppo does, and carry the ends over, too; what these tokens cannot write is not read.
            Without it, evaluate_reward cuts on the reward model's own tokens. In chat the policy's
            tokens are cut.
  head      auto reads ...ForSequenceClassification and ...ForTokenClassification of one label.
            Of two labels, reward_model.positive=LABEL_1 names the good one: the score is its logit
            less the other's. head=tokens with positive='+' and negative='-' reads two tokens of a
            language model. The log says what is read; segjax/hf/score_head.py lists the forms.
  steps     segmentation.boundary=delimiter and delimiters, or boundary=function, cut into steps.
            step_tag is put behind each, and its score read there; step_delimiter replaces the white
            space between steps. Math-Shepherd's form: step_tag=' ки', a line end as step_delimiter,
            head=tokens. Qwen2.5-Math's form: step_tag='<extra_0>', step_delimiter='',
            positive=LABEL_1. These are forms; no published model was run here.
  several   Lines of config.rewards read text where tokenizer or chat template is another, too, and
            have the same keys. Tags stand at a line's own segments with reward_shaping.mix=token,
            at those of the first reward model with mix=segment.
  search    The best of each segment (sample.search=segment, /best N segments) is found at the ends
            of segments; of a longer one the part so far is read, with a tag behind it, too.
  limits    Not on text: score_jump, redistribute=gradient or attention, critic.init=reward_model,
            adapters on the policy's base; with step_tag, redistribute=red. credit leaves out what
            its reward model cannot serve, and of one that reads text the Shapley values, with a
            line for each. A text longer than its positions loses the beginning of its prompt; a
            warning says so. Only one label without a bias is trained further, by reward and as a
            critic.
"""
