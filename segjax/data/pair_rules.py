"""Which parts of a pair are read, and how published code differs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PairRules:
  """Which parts of a pair are read, and which mistakes of published code are repeated.

  Attributes:
    ratings: read the pair's ratings, which have to be numbers.
    force_stop: overwrite the last kept token of a truncated response by the stop token, and count
      the response as finished.
    keep_identical: keep pairs whose sides are the same.
    strip_system_preamble: remove the first len(tokenizer.preamble) characters of the prompt's
      text, even if the prompt has its own system message, which then loses its beginning.
    skip_labelled: leave out rows whose steps have labels, which `step_labels` reads, and count them
      in `with_steps`.
  """

  ratings: bool = True
  force_stop: bool = False
  keep_identical: bool = False
  strip_system_preamble: bool = False
  skip_labelled: bool = False


DEFAULT_RULES = PairRules()
