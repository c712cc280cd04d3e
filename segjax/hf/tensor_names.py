"""Maps our tensors to HF's by one table of names and shapes.

The table is used in both directions: by `reader` to load and by `writer` to save.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from segjax.errors import UserError
from segjax.model.llama import LlamaConfig

HEADS = ('language', 'scalar')
SCORE = 'score'  # HF's name of the scalar head's module

_SHOWN = 5  # names in an error message

# Our path, HF's name, our shape, and the condition of its existence. Kernels are [in, out] here and
# [out, in] in HF files; those of one name there are rows of one HF tensor, in this order. L layers,
# stacked on axis 0 here and separate tensors there; V vocabulary, D width, H head size, Q query
# heads x H, K key/value heads x H, M MLP width.
_LAYER = 'model.layers.{layer}.'
_TABLE: tuple[tuple[str, str, str, str], ...] = (
  ('backbone/embedding', 'model.embed_tokens.weight', 'V D', ''),
  ('backbone/layers/attention_norm/scale', _LAYER + 'input_layernorm.weight', 'L D', ''),
  ('backbone/layers/query/kernel', _LAYER + 'self_attn.q_proj.weight', 'L D Q', 'separate'),
  ('backbone/layers/query/bias', _LAYER + 'self_attn.q_proj.bias', 'L Q', 'attention_bias'),
  ('backbone/layers/key/kernel', _LAYER + 'self_attn.k_proj.weight', 'L D K', 'separate'),
  ('backbone/layers/key/bias', _LAYER + 'self_attn.k_proj.bias', 'L K', 'attention_bias'),
  ('backbone/layers/value/kernel', _LAYER + 'self_attn.v_proj.weight', 'L D K', 'separate'),
  ('backbone/layers/value/bias', _LAYER + 'self_attn.v_proj.bias', 'L K', 'attention_bias'),
  ('backbone/layers/query/kernel', _LAYER + 'self_attn.qkv_proj.weight', 'L D Q', 'fused'),
  ('backbone/layers/key/kernel', _LAYER + 'self_attn.qkv_proj.weight', 'L D K', 'fused'),
  ('backbone/layers/value/kernel', _LAYER + 'self_attn.qkv_proj.weight', 'L D K', 'fused'),
  ('backbone/layers/query_norm/scale', _LAYER + 'self_attn.q_norm.weight', 'L H', 'qk_norm'),
  ('backbone/layers/key_norm/scale', _LAYER + 'self_attn.k_norm.weight', 'L H', 'qk_norm'),
  ('backbone/layers/output/kernel', _LAYER + 'self_attn.o_proj.weight', 'L Q D', ''),
  ('backbone/layers/output/bias', _LAYER + 'self_attn.o_proj.bias', 'L D', 'output_bias'),
  ('backbone/layers/mlp_norm/scale', _LAYER + 'post_attention_layernorm.weight', 'L D', ''),
  ('backbone/layers/gate/kernel', _LAYER + 'mlp.gate_proj.weight', 'L D M', 'separate'),
  ('backbone/layers/gate/bias', _LAYER + 'mlp.gate_proj.bias', 'L M', 'mlp_bias'),
  ('backbone/layers/up/kernel', _LAYER + 'mlp.up_proj.weight', 'L D M', 'separate'),
  ('backbone/layers/up/bias', _LAYER + 'mlp.up_proj.bias', 'L M', 'mlp_bias'),
  ('backbone/layers/gate/kernel', _LAYER + 'mlp.gate_up_proj.weight', 'L D M', 'fused'),
  ('backbone/layers/up/kernel', _LAYER + 'mlp.gate_up_proj.weight', 'L D M', 'fused'),
  ('backbone/layers/down/kernel', _LAYER + 'mlp.down_proj.weight', 'L M D', ''),
  ('backbone/layers/down/bias', _LAYER + 'mlp.down_proj.bias', 'L D', 'mlp_bias'),
  ('backbone/norm/scale', 'model.norm.weight', 'D', ''),
  ('lm_head/kernel', 'lm_head.weight', 'D V', 'language'),
  ('scalar_head/kernel', '{score}.weight', 'D 1', 'scalar'),
)


@dataclasses.dataclass(frozen=True)
class TensorMapping:
  """One of our tensors and the HF tensors that it consists of, or of parts of which it does.

  Attributes:
    path: path of our tensor in the parameter tree, 'a/b/c'.
    template: HF's name, with {layer} for the layer.
    shape: shape of our tensor.
    stacked: axis 0 is the layer, and each layer is a separate tensor in HF files.
    transposed: HF's matrices are [out, in].
    hf_whole: shape of each of the HF tensors where ours is a part of it; () where it is all of it.
    begin: where in the HF tensor that part begins, by axis.
  """

  path: str
  template: str
  shape: tuple[int, ...]
  stacked: bool
  transposed: bool
  hf_whole: tuple[int, ...] = ()
  begin: tuple[int, ...] = ()

  @property
  def hf_shape(self) -> tuple[int, ...]:
    """Shape of each of the HF tensors."""
    return self.hf_whole or self.part_shape

  @property
  def row(self) -> int:
    """Row of the HF tensor at which ours begins."""
    return self.begin[0] if self.begin else 0

  @property
  def part(self) -> tuple[slice, ...]:
    """The slice of each of the HF tensors that is ours."""
    begin = self.begin or (0,) * len(self.part_shape)
    return tuple(slice(b, b + size) for b, size in zip(begin, self.part_shape, strict=True))

  @property
  def part_shape(self) -> tuple[int, ...]:
    """Shape of ours in each of the HF tensors, in their orientation."""
    shape = self.shape[1:] if self.stacked else self.shape
    return shape[::-1] if self.transposed else shape

  def hf_name(self, layer: int = 0) -> str:
    """Returns HF's name of layer `layer`, or of the only tensor."""
    return self.template.format(layer=layer)

  def hf_names(self) -> tuple[str, ...]:
    """Returns HF's names of all layers, or of the only tensor."""
    return tuple(self.hf_name(layer) for layer in range(self.shape[0] if self.stacked else 1))

  def pieces(
    self, index: tuple[slice, ...], item_size: int, max_bytes: int
  ) -> list[tuple[slice, ...]]:
    """Splits the slice `index` of our tensor into even pieces of about `max_bytes` bytes or less.

    Each piece is of one layer and a range of the HF tensor's rows, so that it is contiguous in the
    file; a slice that is small enough is not split.

    Args:
      index: slices of step 1; their bounds may be None.
      item_size: bytes per element.
      max_bytes: approximate limit of a piece.
    """
    bounds = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
    full = tuple(slice(part.start, part.stop) for part in bounds)
    total = math.prod(map(len, bounds)) * item_size
    if total <= max_bytes:
      return [full]
    layers = bounds[0] if self.stacked else [None]
    row_axis = len(bounds) - 1 if self.transposed else int(self.stacked)
    rows = bounds[row_axis]
    max_rows = max(1, max_bytes * len(rows) * len(layers) // total)
    step = math.ceil(len(rows) / math.ceil(len(rows) / max_rows))
    pieces = []
    for layer in layers:
      for row in rows[::step]:
        piece = list(full)
        if layer is not None:
          piece[0] = slice(layer, layer + 1)
        piece[row_axis] = slice(row, min(row + step, rows.stop))
        pieces.append(tuple(piece))
    return pieces


def tensor_mappings(
  config: LlamaConfig, head: str, score: str = SCORE
) -> tuple[TensorMapping, ...]:
  """Returns the tensors of a model in the order of the table.

  Args:
    config: the network.
    head: 'language' or 'scalar'.
    score: HF's name of the scalar head's module.

  Raises:
    ValueError: `head` is neither.
  """
  if head not in HEADS:
    raise UserError(f'head={head!r} is not one of {HEADS}.')
  fused = fuses(config)
  present = {
    '': True,
    'attention_bias': config.attention_bias,
    'output_bias': config.output_bias,
    'mlp_bias': config.mlp_bias,
    'qk_norm': config.qk_norm,
    'separate': not fused,
    'fused': fused,
    'language': head == 'language' and not config.tie_word_embeddings,
    'scalar': head == 'scalar',
  }
  size = {
    'L': config.num_hidden_layers,
    'V': config.vocab_size,
    'D': config.hidden_size,
    'H': config.head_dim,
    'Q': config.num_attention_heads * config.head_dim,
    'K': config.num_key_value_heads * config.head_dim,
    'M': config.intermediate_size,
    '1': 1,
  }
  return _joined(
    TensorMapping(
      path,
      template.replace('{score}', score),
      tuple(size[letter] for letter in letters.split()),
      stacked=letters.startswith('L'),
      transposed=path.endswith('kernel'),
    )
    for path, template, letters, condition in _TABLE
    if present[condition]
  )


def fuses(config: LlamaConfig) -> bool:
  """Returns whether query, key and value are one HF tensor, and gate and up another."""
  return config.family == 'phi3'


def _joined(entries: Iterable[TensorMapping]) -> tuple[TensorMapping, ...]:
  """Returns the entries with those of one name as consecutive rows of one HF tensor."""
  by_name: dict[str, list[TensorMapping]] = {}
  for entry in entries:
    by_name.setdefault(entry.template, []).append(entry)
  joined = []
  for parts in by_name.values():
    if len(parts) == 1:
      joined += parts
      continue
    rows = [part.part_shape[0] for part in parts]
    whole = (sum(rows), *parts[0].part_shape[1:])
    for part, end, size in zip(parts, itertools.accumulate(rows), rows, strict=True):
      joined.append(dataclasses.replace(part, hf_whole=whole, begin=(end - size, 0)))
  return tuple(joined)


def list_tensors(names: Sequence[str]) -> str:
  """Returns the first names, and how many more there are, for an error message."""
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return f'tensor{"s" if len(names) > 1 else ""} {", ".join(names[:_SHOWN])}{more}'
