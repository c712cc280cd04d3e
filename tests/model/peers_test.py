"""Greedy decoding against transformers, on a trained checkpoint: token by token."""

import jax
import numpy as np
import pytest
import torch
import transformers
from fixtures import models

from segjax.hf import reader
from segjax.model.generate import GenerationOptions, generate, make_decode_config
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch

pytestmark = pytest.mark.campaign

PROMPTS, NEW, PAD = 64, 32, 0
TIE = 1e-5  # logits nearer than this may be ranked either way
STOP_IDS = (2, 426)  # the ends of a text and of a sentence


@pytest.fixture(scope='module')
def model(shared_files):
  """Parameters, their config, and transformers' model."""
  source = shared_files / 'models' / 'stories260k-hf'
  config = reader.load_config(source)
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # so small a network is slower on more
  peer = transformers.LlamaForCausalLM.from_pretrained(source, attn_implementation='eager')
  yield reader.load_params(source, config, 'language'), config, peer.eval()
  torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def prompts(model):
  """64 stories, cut to lengths 1 to 64, each begun from another token."""
  _, config, peer = model
  rng = np.random.default_rng(0)
  first = rng.choice(np.arange(3, config.vocab_size), PROMPTS, replace=False)
  start = torch.tensor(np.stack([np.ones_like(first), first], axis=1))
  stories = _peer_generate(peer, start, torch.ones_like(start), PROMPTS - 2, None).sequences
  length = 1 + rng.permutation(PROMPTS).astype(np.int32)
  ids = np.where(np.arange(PROMPTS) < length[:, None], stories.numpy(), PAD).astype(np.int32)
  return PromptBatch(ids, length)


@pytest.fixture(scope='module')
def expected(model, prompts):
  """Tokens and logits of transformers, all prompts in one batch, padded on the left."""
  position = np.arange(PROMPTS) - (PROMPTS - prompts.prompt_length[:, None])
  ids = np.take_along_axis(prompts.prompt_ids, np.maximum(position, 0), axis=1)
  ids, mask = torch.tensor(np.where(position >= 0, ids, PAD)), torch.tensor(position >= 0).long()
  output = _peer_generate(model[2], ids, mask, NEW, list(STOP_IDS))
  return output.sequences[:, PROMPTS:].numpy(), torch.stack(output.logits, dim=1).numpy()


def _peer_generate(peer, ids, mask, new, stop_ids):
  with torch.inference_mode():
    return peer.generate(
      ids,
      attention_mask=mask,
      do_sample=False,
      max_new_tokens=new,
      eos_token_id=stop_ids,
      pad_token_id=PAD,
      output_logits=True,
      return_dict_in_generate=True,
    )


def _generate(model, prompts, **values):
  options = GenerationOptions(**values)
  params, config, _ = model
  mesh = models.mesh(1)
  sampling = Sampling(temperature=0.0, min_new_tokens=0, max_new_tokens=NEW)
  decoder = make_decode_config(config, sampling, STOP_IDS, mesh)
  return generate(params, prompts, jax.random.key(0), decoder=decoder, mesh=mesh, options=options)


def _same(ids, mask, peer_ids, peer_logits):
  """Whether a response is that of transformers, up to a tie, after which they may go apart."""
  count = int(mask.sum())
  for t in range(count):
    if ids[t] != peer_ids[t]:
      gap = peer_logits[t].max() - peer_logits[t, ids[t]]
      assert gap < TIE, f'token {t} is {ids[t]}, not {peer_ids[t]}: its logit is {gap:.1e} lower'
      return False
  # Where ours ended, theirs did: padding from there on.
  assert count == NEW or ids[count - 1] in STOP_IDS
  assert (peer_ids[count:] == PAD).all()
  return True


def test_prompts_one_by_one(model, prompts):
  """Prompts one by one, and the peer's without padding."""
  rows = [int(row) for row in np.argsort(prompts.prompt_length)[[0, 20, 63]]]
  for row in rows:
    length = prompts.prompt_length[row]
    alone = PromptBatch(
      prompts.prompt_ids[row : row + 1, :length], prompts.prompt_length[row : row + 1]
    )
    out = _generate(model, alone)
    ids = torch.tensor(alone.prompt_ids).long()
    peer = _peer_generate(model[2], ids, torch.ones_like(ids), NEW, list(STOP_IDS))
    logits = torch.stack(peer.logits, dim=1).numpy()[0]
    assert _same(out.response_ids[0], out.response_mask[0], peer.sequences[0, length:], logits)


def test_refilled_in_any_order(model, prompts, expected):
  """64 prompts through 5 slots, shuffled."""
  order = np.random.default_rng(1).permutation(PROMPTS)
  shuffled = PromptBatch(prompts.prompt_ids[order], prompts.prompt_length[order])
  out = _generate(model, shuffled, max_concurrent=5, prompt_index=order)
  count = out.response_mask.sum(axis=1)
  assert len(np.unique(count)) > 15  # so that slots were refilled at all times
  assert (count == NEW).any() and 10 < out.finished.sum() < PROMPTS
  same = [
    _same(out.response_ids[i], out.response_mask[i], expected[0][row], expected[1][row])
    for i, row in enumerate(order)
  ]
  assert sum(same) >= PROMPTS - 2  # ties are rare
