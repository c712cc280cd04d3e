"""Describes the metrics of training on rows and on pairs: SFT, reward model, DPO."""

from segjax.report.metric_entry import Entry

TRAINING_ENTRIES = (
  Entry(
    ('weights/*',),
    'hash of the trained weights of a network after the step, modulo 2^32: equal in runs that '
    'computed the same to the bit; `segjax replay RUN STEP` computes a step again',
  ),
  Entry(
    ('eval/accuracy', 'eval/margin', 'eval/length_baseline_accuracy', 'eval/ece'),
    'reward model, or implicit reward of DPO, on held-out pairs, every `*.eval_every` steps',
    'accuracy above length_baseline_accuracy',
    'falls while the accuracy in training rises: fewer epochs',
  ),
  Entry(
    ('eval/step_loss', 'eval/step_accuracy'),
    'reward model on held-out labelled steps beside pairs, every `reward.eval_every` steps',
    'as in training',
    'the loss rises while that in training falls: fewer epochs',
  ),
  Entry(
    ('eval/loss', 'eval/entropy'),
    'the same as in training on held-out rows, every `*.eval_every` steps: Bradley-Terry loss, or '
    'cross-entropy and entropy',
    'falls with the training loss',
    'rises while the training loss falls: fewer epochs',
  ),
  Entry(
    ('sft/loss', 'sft/entropy'),
    'SFT: cross-entropy and entropy, nats per token',
    'falls',
    'rises: lower the learning rate',
  ),
  Entry(
    ('reward_model/loss',),
    'reward model: Bradley-Terry loss, ln 2 at the start; without pairs that of labelled steps',
    'falls',
    'rises: lower the learning rate',
  ),
  Entry(
    (
      'reward_model/accuracy',
      'reward_model/margin',
      'reward_model/segments',
      'reward_model/one_token_segments',
    ),
    'reward model: share of pairs whose chosen response scores higher; mean difference; segments '
    'of a response; those of them that are one token',
    'accuracy 0.65 to 0.8 on human pairs',
    '0.5: check the learning rate, the chat template, and the pairs',
  ),
  Entry(
    ('reward_model/step_loss', 'reward_model/step_accuracy'),
    'reward model, labelled steps beside pairs: binary cross-entropy of the score at their ends, '
    'nats per step, ln 2 at the start; share of them whose score has the sign of the label. The '
    'sum `reward_model/loss` + `reward.steps_weight` · `reward_model/step_loss` is minimised',
    'the loss falls, the accuracy rises',
    'flat: raise `reward.steps_weight`; `reward_model/loss` rises: lower it',
  ),
  Entry(
    ('dpo/loss', 'dpo/accuracy', 'dpo/margin'),
    'DPO: Bradley-Terry loss of the implicit rewards β Σ (log π − log π_ref), ln 2 at the start; '
    'share of pairs whose chosen response has the higher one; mean difference',
    'loss falls; accuracy as that of a reward model',
    'accuracy 0.5: raise the learning rate; check the chat template, and the pairs',
  ),
  Entry(
    ('dpo/chosen_reward', 'dpo/rejected_reward'),
    'DPO: mean implicit reward of the chosen and of the rejected responses',
    'the first falls less than the second',
    'the first falls far below 0: lower the learning rate or raise `dpo.beta`',
  ),
)
