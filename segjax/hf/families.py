"""The families of checkpoints that are read, one row each, by model_type of config.json.

They are one network (`model.llama`) with other flags, and names of their own in files. jax is not
imported.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from segjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Family:
  """How the config.json of a family differs from a Llama's.

  Attributes:
    classes: prefix of transformers' classes.
    defaults: of the keys that may be missing, where they are not Llama's.
    fixed: flags of `LlamaConfig` that config.json does not have: those of any model of the family.
  """

  classes: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fixed: Mapping[str, bool] = dataclasses.field(default_factory=dict)


_NO_BIAS = dict.fromkeys(('attention_bias', 'output_bias', 'mlp_bias'), False)
_QWEN = {'num_key_value_heads': 32, 'max_position_embeddings': 32768, 'use_sliding_window': False}

# As in transformers 5. SmolLM2 is a Llama.
FAMILIES = {
  'llama': Family('Llama'),
  'mistral': Family(
    'Mistral',
    {'num_key_value_heads': 8, 'max_position_embeddings': 131_072, 'sliding_window': 4096},
    _NO_BIAS,
  ),
  'qwen2': Family('Qwen2', _QWEN, _NO_BIAS | {'attention_bias': True}),
  'qwen3': Family('Qwen3', _QWEN | {'head_dim': 128}, {'mlp_bias': False, 'qk_norm': True}),
  'phi3': Family(
    'Phi3',
    {
      **dict.fromkeys(('max_position_embeddings', 'original_max_position_embeddings'), 4096),
      'rms_norm_eps': 1e-5,
    },
    _NO_BIAS,
  ),
}

READ = f'{", ".join(tuple(FAMILIES)[:-1])} and {tuple(FAMILIES)[-1]} models are read'


def find_family(location: str, raw: dict[str, Any], default: str | None = None) -> str:
  """Returns the family of a raw config.json.

  Args:
    location: the file, for the error.
    raw: its content.
    default: the family where there is no model_type.

  Raises:
    UserError: the family is not one of those that are read.
  """
  name = raw.get('model_type', default)
  if not isinstance(name, str) or name not in FAMILIES:
    raise UserError(f'{location}: model_type is {name!r}; only {READ}.')
  return name


def with_defaults(family: str, raw: dict[str, Any]) -> dict[str, Any]:
  """Returns a raw config.json with the keys that it lacks and that are not Llama's defaults."""
  return {**FAMILIES[family].defaults, **raw}
