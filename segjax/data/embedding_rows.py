"""Refuses token ids for which an embedding has no row; a lookup would return its last row."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EmbeddingRows:
  """The number of rows of the smallest embedding that reads token ids, and its model's name."""

  count: int
  model: str

  def check(self, tokenizer: Any, rows: Sequence[Any]) -> None:
    """Raises UserError if there is an id without an embedding.

    Args:
      tokenizer: `transformers` tokenizer, for the error.
      rows: token ids of texts, lists or arrays.
    """
    largest = max((int(np.max(ids)) for ids in rows if len(ids)), default=0)
    if largest >= self.count:
      token = tokenizer.convert_ids_to_tokens(largest)
      raise UserError(
        f'the tokenizer writes {token!r} as id {largest}, but the embedding of the {self.model} '
        f'has {self.count} rows (vocab_size in config.json); use the tokenizer that belongs to the '
        'weights, or give the model rows for all tokens '
        '(model.resize_token_embeddings(len(tokenizer)) in transformers).'
      )


def smallest_embedding(networks: Mapping[str, Any]) -> EmbeddingRows:
  """Returns the rows of the smallest embedding among networks, `LlamaConfig` by name."""
  model = min(networks, key=lambda name: networks[name].vocab_size)
  return EmbeddingRows(networks[model].vocab_size, model)


def check_sampled_ids(policy: Any, readers: Mapping[str, Any]) -> None:
  """Raises UserError if the policy, a `LlamaConfig`, can sample ids that another cannot read."""
  rows = smallest_embedding(readers)
  if policy.vocab_size > rows.count:
    raise UserError(
      f'the policy samples ids up to {policy.vocab_size - 1}, but the embedding of the '
      f'{rows.model} has {rows.count} rows (vocab_size in config.json); give both the same number '
      'of rows (model.resize_token_embeddings(N) in transformers).'
    )
