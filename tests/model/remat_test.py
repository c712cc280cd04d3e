import functools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals

from segjax.model import attention as module
from segjax.model.attention import attention
from segjax.model.flash import flash
from segjax.model.remat import checkpoint_policy
from segjax.model.splash import splash

IDS = jnp.ones((1, 128), jnp.int32)
TENSORS = [jax.ShapeDtypeStruct((1, 128, heads, 16), jnp.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
  ('name', 'saved'),
  [
    ('xla', ['bf16[1,128,4,16]']),
    # The sums of the softmax too.
    ('flash', ['bf16[1,128,4,16]', 'f32[1,4,128]']),
    ('splash', ['bf16[1,2,2,128,16]', 'f32[1,2,2,128]']),
  ],
)
def test_attention_saves_what_its_backward_pass_needs(monkeypatch, capsys, name, saved):
  """Once, and with it all that the kernel computes, so that it does not run again."""
  monkeypatch.setattr(module, 'splash', functools.partial(splash, interpret=True))
  monkeypatch.setattr('segjax.model.flash.flash', functools.partial(flash, interpret=True))

  def attend(*tensors):
    return jnp.tanh(attention(*tensors, name, segment_ids=IDS))

  def saved_by(policy):
    print_saved_residuals(jax.checkpoint(attend, policy=policy), *TENSORS)
    lines = capsys.readouterr().out.splitlines()
    return sorted(
      line.split()[0] for line in lines if ' argument ' not in line and 'constant' not in line
    )

  assert saved_by(checkpoint_policy('full', '')) == []
  assert saved_by(checkpoint_policy('query,attention', '')) == saved
