"""What `decode` compares: segjax's decoder and transformers', and the tasks that both are given."""

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

STOP = 0  # its column of the head is 0, so that it is never the likeliest
QUEUE = 8  # batches that wait, where responses are ragged
MEAN = 0.25  # of their lengths, of the maximum
TIE = 1e-4  # logits nearer than this may be taken either way

SIZES = {  # vocabulary, width, MLP, layers, heads, key heads, head size, tied, dtype
  'tiny': (256, 32, 64, 2, 4, 2, 8, False, 'float32'),
  'small': (4096, 256, 1024, 4, 8, 2, 32, False, 'float32'),
  '1b': (128256, 2048, 8192, 16, 32, 8, 64, True, 'bfloat16'),
  '8b': (128256, 4096, 14336, 32, 32, 8, 128, False, 'bfloat16'),
}


@dataclasses.dataclass(frozen=True)
class Task:
  """Prompts [N, P] to be answered, `batch` at a time, with `limits` [N] tokens of at most `new`."""

  kind: str
  batch: int
  prompts: np.ndarray
  limits: np.ndarray
  new: int

  @property
  def is_greedy(self) -> bool:
    return self.kind == 'equal'

  @property
  def tokens(self) -> int:
    return int(self.limits.sum())

  def __str__(self) -> str:
    return f'{self.kind}, batch {self.batch}'


def make_task(kind: str, batch: int, prompt: int, new: int, config: LlamaConfig) -> Task:
  rng = np.random.default_rng(batch)
  count = batch if kind == 'equal' else QUEUE * batch
  prompts = rng.integers(1, config.vocab_size, (count, prompt)).astype(np.int32)
  limits = np.full(count, new)
  if kind == 'ragged':
    limits = np.minimum(rng.geometric(1 / (MEAN * new), count), new)
  return Task(kind, batch, prompts, limits, new)


class Ours:
  """segjax's decoder with random weights."""

  def __init__(self, config: LlamaConfig):
    devices = jax.devices()
    self.is_accelerated = devices[0].platform != 'cpu'
    self.device = devices[0].device_kind if self.is_accelerated else 'CPU'
    self.config = config
    self.mesh = make_mesh(devices=devices if self.is_accelerated else devices[:1])
    where = sharding.tree_shardings(heads.param_shapes(config, 'language'), self.mesh)
    self.params = jax.jit(_params, static_argnums=0, out_shardings=where)(config)

  def __call__(
    self, task: Task, limits: np.ndarray | None = None, room: int = 1
  ) -> GenerationResult:
    """Responses; `room` is for how many times as many tokens as the task may need."""
    # Where tokens are drawn, stopping is by length alone, on both sides.
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

  def forget_peak(self) -> None:
    """Resident memory's peak begins anew; that of an accelerator cannot."""
    with contextlib.suppress(OSError):
      Path('/proc/self/clear_refs').write_text('5')

  def peak_memory(self) -> int:
    """Bytes: of the first device since the start, or resident of the process."""
    if self.is_accelerated:
      return jax.devices()[0].memory_stats()['peak_bytes_in_use']
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


class Peer:
  """transformers with the weights in `directory`: eager attention, dynamic or static cache."""

  def __init__(self, directory: Path, cache: str):
    import torch
    import transformers

    torch.set_num_threads(cores())
    self._torch = torch
    load = transformers.LlamaForCausalLM.from_pretrained
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    self._model = load(directory, attn_implementation='eager', dtype='float32').eval()
    if shown:
      logging.enable_progress_bar()
    self._model.generation_config.eos_token_id = None
    self._cache = {'cache_implementation': 'static'} if cache == 'static' else {}

  def __call__(self, task: Task) -> list[np.ndarray]:
    """Responses of consecutive batches, each as long as the longest of its batch."""
    torch, found = self._torch, []
    start = task.prompts.shape[1]
    for begin in range(0, len(task.prompts), task.batch):
      rows = slice(begin, begin + task.batch)
      ids, limits = torch.tensor(task.prompts[rows]).long(), torch.tensor(task.limits[rows])
      if task.is_greedy:
        ends = {'do_sample': False, 'eos_token_id': STOP}
      else:
        ends = {'do_sample': True, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
        ends['stopping_criteria'] = [lambda ids, _, n=limits: ids.shape[1] - start >= n]
      out = self._model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=task.new,
        pad_token_id=STOP,
        **ends,
        **self._cache,
      )
      assert out.shape[1] - start == int(limits.max())
      found.append(out[:, start:].numpy())
    return found

  def check(self, task: Task, out: GenerationResult, expected: np.ndarray) -> int:
    """Rows of greedy tokens that are the same; the others must part at a tie."""
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
  """The result, and seconds."""
  begun = time.perf_counter()
  found = function(*args)
  return found, time.perf_counter() - begun


def cores() -> int:
  return len(os.sched_getaffinity(0))


def _params(config: LlamaConfig):
  """Random weights in the dtype of the network, its stop token never the likeliest."""
  params = heads.init_params(jax.random.key(0), config, 'language')
  if config.tie_word_embeddings:
    table = params['backbone']['embedding']
    params['backbone']['embedding'] = table.at[STOP].set(0)
  else:
    params['lm_head']['kernel'] = params['lm_head']['kernel'].at[:, STOP].set(0)
  return jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
