"""Compares the outputs of transformers and of segjax for the same weights.

The only module of segjax that needs torch. Checkpoints are converted by `convert`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.errors import UserError
from segjax.hf import imported, orbax_stream, reader
from segjax.hf.checkpoint import (
  CONFIG,
  Checkpoint,
  open_checkpoint,
  read_json,
  resolve_checkpoint,
  without_wrapper,
)
from segjax.hf.config import config_from_hf, head_name
from segjax.hf.families import FAMILIES, find_family
from segjax.model import heads
from segjax.model.llama import Llama, LlamaConfig, RowLayout

# Maximum difference of outputs whose mean square is at most 1; it scales with larger outputs.
_TOLERANCES = {'float32': 1e-4, 'float16': 2e-2, 'bfloat16': 1.5e-1}
Tokens = np.ndarray  # [S]
Outputs = Callable[[Tokens, Tokens], Iterator[np.ndarray]]  # ids, positions -> chunks [s, outputs]

_CHUNK = 256  # positions whose logits exist at once
_TOKENS = 64  # tokens of a built-in sequence
_SPREAD_TOKENS = 512  # tokens of one whose positions are spread over a long context
_MAX_CONSECUTIVE = 1024  # the longest context that a built-in sequence covers token by token


@dataclasses.dataclass(frozen=True)
class Difference:
  """Difference of the outputs for one sequence.

  `last` is the position of its last token, `mean_square` that of transformers' outputs.
  """

  length: int
  last: int
  max_abs: float
  mean_abs: float
  mean_square: float = 0.0


@dataclasses.dataclass(frozen=True)
class Verification:
  """Differences of the outputs; `str` is a table to print.

  Attributes:
    compared: 'logits', 'scores' (at every token), or 'hidden states' if the heads differ.
    sequences: differences by sequence.
    max_abs: largest difference over all sequences, positions and outputs.
    mean_abs: mean difference.
    tolerance: limit of `max_abs`.
  """

  compared: str
  sequences: tuple[Difference, ...]
  max_abs: float
  mean_abs: float
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether no output is NaN or differs by more than the tolerance."""
    return self.max_abs <= self.tolerance

  def __str__(self) -> str:
    lines = [f'{"tokens":>8} {"last position":>14} {"max abs":>10} {"mean abs":>10}']
    lines += [
      f'{d.length:8} {d.last:14} {d.max_abs:10.2e} {d.mean_abs:10.2e}' for d in self.sequences
    ]
    verdict = (
      f'{"passed" if self.passed else "FAILED"}: {self.compared} differ by max abs '
      f'{self.max_abs:.2e}, mean abs {self.mean_abs:.2e}; tolerance {self.tolerance:.2e}'
    )
    return '\n'.join([*lines, verdict])


def verify(
  hf: str | Path,
  checkpoint: str | Path | None = None,
  *,
  ids: Sequence[Sequence[int]] | None = None,
  length: int = 0,
  dtype: str = 'float32',
  tolerance: float | None = None,
) -> Verification:
  """Compares transformers' outputs for an HF checkpoint with ours.

  Built-in sequences are random tokens: a short one and one of the model's whole context. If that
  is long, 512 tokens have positions spread over it: RoPE depends on differences of positions alone,
  so this covers them without a pass over tens of thousands of tokens.

  Args:
    hf: directory or hub id.
    checkpoint: ours, imported from `hf` or exported to `hf`; None loads `hf` here too.
    ids: token sequences instead of the built-in ones.
    length: length of one consecutive random sequence instead of the built-in ones.
    dtype: dtype of the computation, on both sides.
    tolerance: limit of the difference; None uses that of the narrowest dtype of computation and
      weights, times the root mean square of transformers' outputs if that is above 1.

  Raises:
    ValueError: torch is missing, a checkpoint cannot be read, or a token is outside the vocabulary.
  """
  if dtype not in _TOLERANCES:
    raise UserError(f'dtype={dtype!r} is not one of {", ".join(_TOLERANCES)}.')
  origin = resolve_checkpoint(hf)
  config = reader.load_config(origin)
  theirs_head = _find_head(origin)
  opened, entries = reader.open_model(origin, config, theirs_head)
  if checkpoint is None:
    ours_head, params = theirs_head, reader.load_params(origin, config, theirs_head, dtype='')
  else:
    config, ours_head, params = _restore(Path(checkpoint).expanduser(), config, theirs_head)
  config = dataclasses.replace(config, dtype=dtype, remat='none')
  narrowest = max(_narrowed_dtype(params, opened, entries), dtype, key=_TOLERANCES.__getitem__)
  headless = ours_head != theirs_head
  sequences = _sequences(config, ids, length)
  theirs = _transformers(origin, theirs_head, headless, dtype)
  ours = _ours(params, config, ours_head, headless)
  differences = [_difference(ours, theirs, *sequence) for sequence in sequences]
  sizes = [difference.length for difference in differences]
  if tolerance is None:
    squares = [difference.mean_square for difference in differences]
    tolerance = _TOLERANCES[narrowest] * max(1.0, float(np.average(squares, weights=sizes)) ** 0.5)
  return Verification(
    compared='hidden states' if headless else 'logits' if ours_head == 'language' else 'scores',
    sequences=tuple(differences),
    max_abs=float(np.max([d.max_abs for d in differences])),
    mean_abs=float(np.average([d.mean_abs for d in differences], weights=sizes)),
    tolerance=tolerance,
  )


def _find_head(origin: Path) -> str:
  score = head_name(read_json(origin / CONFIG))
  tensors = without_wrapper(open_checkpoint(origin)).tensors
  return 'scalar' if f'{score}.weight' in tensors else 'language'


def _restore(
  checkpoint: Path, config: LlamaConfig, head: str
) -> tuple[LlamaConfig, str, dict[str, Any]]:
  """Returns network, head and parameters of a checkpoint of ours.

  A training run's item does not store the first two, so they are those of the HF checkpoint.
  """
  description = checkpoint / imported.DESCRIPTION
  if description.is_file():
    head = imported.HEADS[read_json(description)['role']]
    config = config_from_hf(checkpoint / imported.SOURCE)
    checkpoint = checkpoint / imported.PARAMS
  arrays = orbax_stream.open_arrays(checkpoint.absolute())
  prefix = 'params/' if any(path.startswith('params/') for path in arrays) else ''
  expected = heads.param_shapes(config, head)

  def restore(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
    name = prefix + jax.tree_util.keystr(path, simple=True, separator='/')
    if name not in arrays or arrays[name].shape != shape.shape:
      stored = f'shape {list(arrays[name].shape)}' if name in arrays else 'none'
      raise UserError(f'{checkpoint}: {name} should be {list(shape.shape)}; found {stored}.')
    return jnp.asarray(arrays[name].read().result())

  return config, head, jax.tree_util.tree_map_with_path(restore, expected)


def _narrowed_dtype(params: dict[str, Any], opened: Checkpoint, entries: Sequence) -> str:
  """Returns the dtype of our weights if it is not one of the files', else 'float32'."""
  files = {reader.DTYPES[opened.tensors[name].dtype] for e in entries for name in e.hf_names()}
  own = {leaf.dtype.name for leaf in jax.tree.leaves(params)} - files
  return max(own & set(_TOLERANCES), default='float32', key=_TOLERANCES.__getitem__)


def _difference(ours: Outputs, theirs: Outputs, ids: Tokens, positions: Tokens) -> Difference:
  largest, total, squares, size = 0.0, 0.0, 0.0, 0
  for our, their in zip(ours(ids, positions), theirs(ids, positions), strict=True):
    gap = np.abs(our - their)
    largest = np.maximum(largest, gap.max())  # unlike max(), keeps NaN
    total += gap.sum(dtype=np.float64)
    squares += np.square(their, dtype=np.float64).sum()
    size += gap.size
  return Difference(
    len(ids), int(positions[-1]), float(largest), float(total / size), float(squares / size)
  )


def _sequences(
  config: LlamaConfig, ids: Sequence[Sequence[int]] | None, length: int
) -> list[tuple[Tokens, Tokens]]:
  """Returns token ids and positions of the sequences to compare."""
  draw = np.random.default_rng(0)

  def random(size: int) -> Tokens:
    return draw.integers(0, config.vocab_size, size, dtype=np.int32)

  if ids is not None:
    rows = [np.asarray(row) for row in ids]
    for row in rows or [np.zeros(0)]:
      if row.ndim != 1 or not row.size or row.dtype.kind not in 'iu':
        raise UserError('ids must be sequences of at least one token id.')
      if row.min() < 0 or row.max() >= config.vocab_size:
        bounds = f'{row.min()} to {row.max()}'
        raise UserError(f'ids from {bounds} are not all in the vocabulary of {config.vocab_size}.')
    return [(row.astype(np.int32), np.arange(len(row), dtype=np.int32)) for row in rows]
  if length:
    return [(random(length), np.arange(length, dtype=np.int32))]
  sequences = [(random(_TOKENS), np.arange(_TOKENS, dtype=np.int32))]
  longest = config.max_position_embeddings
  if longest > _TOKENS:
    size = longest if longest <= _MAX_CONSECUTIVE else _SPREAD_TOKENS
    sequences.append((random(size), np.linspace(0, longest - 1, size).astype(np.int32)))
  return sequences


def _ours(params: dict[str, Any], config: LlamaConfig, head: str, headless: bool) -> Outputs:
  if head == 'scalar':
    kernel = params['scalar_head']['kernel']
  elif config.tie_word_embeddings:
    kernel = params['backbone']['embedding'].T
  else:
    kernel = params['lm_head']['kernel']

  @jax.jit
  def backbone(params, ids, positions):
    return Llama(config).apply({'params': params}, ids, RowLayout(positions))

  project = jax.jit(heads.project)

  def outputs(ids: Tokens, positions: Tokens) -> Iterator[np.ndarray]:
    hidden = backbone(params['backbone'], ids[None], positions[None])
    for start in range(0, len(ids), _CHUNK):
      chunk = hidden[:, start : start + _CHUNK]
      yield np.asarray((chunk if headless else project(chunk, kernel))[0], np.float32)

  return outputs


def _transformers(origin: Path, head: str, headless: bool, dtype: str) -> Outputs:
  """Returns the outputs of transformers' own classes: no code of the checkpoint is run."""
  try:
    import torch
  except ImportError as error:
    raise UserError('verify compares with torch, which is not installed: pip install torch') from (
      error
    )
  import transformers

  raw = read_json(origin / CONFIG)
  classes = f'{FAMILIES[find_family(CONFIG, raw)].classes}For'
  load = functools.partial(_load, origin=origin, dtype=getattr(torch, dtype))
  if head == 'language':
    model = load(getattr(transformers, f'{classes}CausalLM'))
    project = model.lm_head
  else:
    name = head_name(raw)  # value_head_prefix may name the head differently
    key_mapping = None if name == 'score' else {rf'^{name}\.': 'score.'}
    scalar = getattr(transformers, f'{classes}SequenceClassification')
    model = load(scalar, num_labels=1, key_mapping=key_mapping)
    project = model.score

  def outputs(ids: Tokens, positions: Tokens) -> Iterator[np.ndarray]:
    with torch.no_grad():
      # Without a mask, transformers treats spread positions as several sequences in one row.
      hidden = model.model(
        torch.tensor(ids[None], dtype=torch.long),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        position_ids=torch.tensor(positions[None], dtype=torch.long),
        use_cache=False,
      ).last_hidden_state[0]
      for start in range(0, len(ids), _CHUNK):
        chunk = hidden[start : start + _CHUNK]
        yield (chunk if headless else project(chunk)).float().numpy()

  return outputs


def _load(model_class: Any, origin: Path, dtype: Any, **kwargs: Any) -> Any:
  """Loads a model of transformers without its progress bar."""
  from transformers.utils import logging

  shown = logging.is_progress_bar_enabled()
  logging.disable_progress_bar()
  try:
    return model_class.from_pretrained(origin, dtype=dtype, use_safetensors=True, **kwargs).eval()
  finally:
    if shown:
      logging.enable_progress_bar()
