"""Defines what `decode` compares: the decoders of segjax and transformers, and their tasks."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from segjax.model import heads, sharding
from segjax.model.generate import (
  GenerationOptions,
  GenerationResult,
  generate,
  make_decode_config,
)
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import make_mesh
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch

STOP = 0  # its column of the head is 0, so that it is never the most likely token
QUEUE = 8  # number of batches in a ragged task
MEAN = 0.25  # mean length of its responses, as a fraction of the maximum
TIE = 1e-4  # logits nearer than this count as equal

SIZES = {  # vocabulary, width, MLP, layers, heads, key heads, head size, tied, dtype
  'tiny': (256, 32, 64, 2, 4, 2, 8, False, 'float32'),
  'small': (4096, 256, 1024, 4, 8, 2, 32, False, 'float32'),
  '1b': (128256, 2048, 8192, 16, 32, 8, 64, True, 'bfloat16'),
  '8b': (128256, 4096, 14336, 32, 32, 8, 128, False, 'bfloat16'),
}


@dataclasses.dataclass(frozen=True)
class Task:
  """Prompts [N, P], decoded `batch` at a time into responses of `limits` [N] <= `new` tokens."""

  kind: str
  batch: int
  prompts: np.ndarray
  limits: np.ndarray
  new: int

  @property
  def is_greedy(self) -> bool:
    """Whether the most likely tokens are taken, and all responses have `new` tokens."""
    return self.kind == 'equal'

  @property
  def tokens(self) -> int:
    """Number of response tokens."""
    return int(self.limits.sum())

  def __str__(self) -> str:
    return f'{self.kind}, batch {self.batch}'


def make_task(kind: str, batch: int, prompt: int, new: int, config: LlamaConfig) -> Task:
  """Returns random prompts; responses are of equal lengths, or ragged."""
  rng = np.random.default_rng(batch)
  count = batch if kind == 'equal' else QUEUE * batch
  prompts = rng.integers(1, config.vocab_size, (count, prompt)).astype(np.int32)
  limits = np.full(count, new)
  if kind == 'ragged':
    limits = np.minimum(rng.geometric(1 / (MEAN * new), count), new)
  return Task(kind, batch, prompts, limits, new)


class Segjax:
  """The decoder of segjax with random weights."""

  def __init__(self, config: LlamaConfig):
    devices = jax.devices()
    self.is_accelerated = devices[0].platform != 'cpu'
    self.device = devices[0].device_kind if self.is_accelerated else 'CPU'
    self.config = config
    self.mesh = make_mesh(devices=devices if self.is_accelerated else devices[:1])
    shardings = sharding.tree_shardings(heads.param_shapes(config, 'language'), self.mesh)
    self.params = jax.jit(_params, static_argnums=0, out_shardings=shardings)(config)

  def __call__(
    self, task: Task, limits: np.ndarray | None = None, room: int = 1
  ) -> GenerationResult:
    """Returns the responses; the cache has room for `room` times the tokens of the task."""
    # Sampled responses end by length alone, with transformers too, so that both do equal work.
    sampling = Sampling(
      temperature=0.0 if task.is_greedy else 1.0,
      min_new_tokens=0 if task.is_greedy else task.new,
      max_new_tokens=task.new * room,
    )
    return generate(
      self.params,
      PromptBatch(task.prompts, np.full(len(task.prompts), task.prompts.shape[1])),
      jax.random.key(0),
      decoder=make_decode_config(self.config, sampling, (STOP,), self.mesh),
      mesh=self.mesh,
      options=GenerationOptions(task.batch, limits=task.limits if limits is None else limits),
    )

  def reset_peak_memory(self) -> None:
    """Resets the peak of resident memory; that of an accelerator cannot be reset."""
    with contextlib.suppress(OSError):
      Path('/proc/self/clear_refs').write_text('5')

  def peak_memory(self) -> int:
    """Returns the peak bytes of the first device, or the peak resident bytes of the process."""
    if self.is_accelerated:
      return jax.devices()[0].memory_stats()['peak_bytes_in_use']
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


class Transformers:
  """The decoder of transformers: eager attention, dynamic or static cache."""

  def __init__(self, directory: Path, cache: str):
    import torch
    import transformers

    torch.set_num_threads(cores())
    self._torch = torch
    load = transformers.LlamaForCausalLM.from_pretrained
    logging = transformers.utils.logging
    has_progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    self._model = load(directory, attn_implementation='eager', dtype='float32').eval()
    if has_progress_bar:
      logging.enable_progress_bar()
    self._model.generation_config.eos_token_id = None
    self._cache = {'cache_implementation': 'static'} if cache == 'static' else {}

  def __call__(self, task: Task) -> list[np.ndarray]:
    """Returns the responses of consecutive batches, each padded to the longest of its batch."""
    torch, responses = self._torch, []
    start = task.prompts.shape[1]
    for first in range(0, len(task.prompts), task.batch):
      rows = slice(first, first + task.batch)
      ids, limits = torch.tensor(task.prompts[rows]).long(), torch.tensor(task.limits[rows])
      if task.is_greedy:
        options = {'do_sample': False, 'eos_token_id': STOP}
      else:
        options = {'do_sample': True, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
        options['stopping_criteria'] = [lambda ids, _, n=limits: ids.shape[1] - start >= n]
      out = self._model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=task.new,
        pad_token_id=STOP,
        **options,
        **self._cache,
      )
      assert out.shape[1] - start == int(limits.max())
      responses.append(out[:, start:].numpy())
    return responses

  def check(self, task: Task, out: GenerationResult, expected: np.ndarray) -> int:
    """Returns the number of equal greedy rows; asserts that the others differ at a tie first."""
    differs = out.response_ids != expected
    for row in np.flatnonzero(differs.any(axis=1)):
      t = int(differs[row].argmax())
      ids = np.concatenate([task.prompts[row], expected[row, :t]])
      with self._torch.inference_mode():
        logits = self._model(self._torch.tensor(ids)[None].long()).logits[0, -1].numpy()
      gap = logits.max() - logits[out.response_ids[row, t]]
      assert gap < TIE, f'{task}: row {row} differs at token {t} by {gap:.1e} in the logits'
    return int((~differs.any(axis=1)).sum())


def make_config(shape: str, positions: int) -> LlamaConfig:
  """Returns the network of a size of SIZES."""
  vocab, width, mlp, layers, count, kv, size, tied, dtype = SIZES[shape]
  return LlamaConfig(
    vocab_size=vocab,
    hidden_size=width,
    intermediate_size=mlp,
    num_hidden_layers=layers,
    num_attention_heads=count,
    num_key_value_heads=kv,
    head_dim=size,
    tie_word_embeddings=tied,
    dtype=dtype,
    max_position_embeddings=positions,
  )


def timed(function: Callable, *args) -> tuple:
  """Returns the result of a call and its seconds."""
  begin = time.perf_counter()
  result = function(*args)
  return result, time.perf_counter() - begin


def cores() -> int:
  """Returns the number of CPU cores that this process may use."""
  return len(os.sched_getaffinity(0))


def _params(config: LlamaConfig):
  """Returns random weights with which the stop token is never the most likely one."""
  params = heads.init_params(jax.random.key(0), config, 'language')
  if config.tie_word_embeddings:
    table = params['backbone']['embedding']
    params['backbone']['embedding'] = table.at[STOP].set(0)
  else:
    params['lm_head']['kernel'] = params['lm_head']['kernel'].at[:, STOP].set(0)
  return jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
