"""The head of a reward model, where its checkpoint has another one than a scalar without a bias."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ScoreHead:
  """How the score is made of a head in a checkpoint: one logit, or one less another.

    score = (w_positive - w_negative)ᵀ x + b_positive - b_negative,  x = h or ReLU(W h + b)

  with h the last hidden state of a token. Of a classifier of two labels it is the log-odds of the
  positive one, of a language model ln p(positive token) - ln p(negative token).

  Attributes:
    module: HF's name of the layer that has the logits.
    rows: its logits.
    positive: the logit that counts for a good text.
    negative: the one that is subtracted; None for none.
    has_bias: whether the layer has a bias.
    hidden: HF's name of a layer in front of it, W and b; '' for none.
  """

  module: str
  rows: int
  positive: int = 0
  negative: int | None = None
  has_bias: bool = False
  hidden: str = ''

  @property
  def names(self) -> tuple[str, ...]:
    """HF's names of its tensors."""
    bias = (f'{self.module}.bias',) if self.has_bias else ()
    hidden = (f'{self.hidden}.weight', f'{self.hidden}.bias') if self.hidden else ()
    return (f'{self.module}.weight', *bias, *hidden)
