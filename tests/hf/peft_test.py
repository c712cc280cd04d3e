"""Parity with peft, whose import takes seconds: outputs, files, an optimizer step, the cards."""

import contextlib
import dataclasses
import io
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from fixtures import hf_models, tokenizers

from segjax.config.settings import Lora, Optimizer
from segjax.config.training_settings import LORA_TARGETS
from segjax.data.tokenizer import load_tokenizer
from segjax.hf import adapter, adapter_writer, merge, model_card, reader
from segjax.model import heads, lora
from segjax.train.optimizer import apply_update, init_state

pytestmark = pytest.mark.campaign

TOLERANCE = 1e-5  # float32 on both sides; times the largest output
IDS = hf_models.IDS
TORCH_IDS = torch.tensor(IDS, dtype=torch.long)
MODELS = {
  'language': transformers.AutoModelForCausalLM,
  'scalar': transformers.AutoModelForSequenceClassification,
}


@pytest.fixture(scope='module')
def peft():
  return pytest.importorskip('peft')


def _wrapped(peft, base, head, **fields):
  """A random adapter of peft on a base."""
  task = 'CAUSAL_LM' if head == 'language' else 'SEQ_CLS'
  config = peft.LoraConfig(task_type=task, **{'r': 4, 'lora_alpha': 8} | fields)
  model = peft.get_peft_model(MODELS[head].from_pretrained(base, num_labels=1), config)
  torch.manual_seed(1)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'lora_' in name or 'modules_to_save' in name:
        parameter.copy_(0.1 * torch.randn_like(parameter))
  return model


def _their_outputs(model):
  with torch.no_grad():
    return model(TORCH_IDS).logits.numpy()


def _our_outputs(params, config, head):
  if head == 'language':
    return np.asarray(heads.logits(params, jnp.asarray(IDS), config))
  return np.asarray(heads.scores(params, jnp.asarray(IDS), config))[:, -1:]


def _assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@contextlib.contextmanager
def _without_warnings_of_keys():
  """Fails if a key of an adapter is missing or unexpected when peft loads it."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    yield
  texts = [str(warning.message) for warning in caught]
  assert not [text for text in texts if 'key' in text.lower() or 'adapter' in text.lower()], texts


ALL = {'target_modules': 'all-linear'}
HEADED = ALL | {'modules_to_save': ['lm_head']}


@pytest.mark.parametrize(
  ('kind', 'base_head', 'head', 'fields'),
  [
    ('llama3', 'language', 'language', ALL),
    ('llama31', 'language', 'language', {'target_modules': ['q_proj', 'v_proj']}),
    ('llama32', 'language', 'language', ALL | {'use_rslora': True, 'r': 3}),
    ('llama3', 'language', 'language', HEADED),
    ('biases', 'language', 'language', {'target_modules': ['self_attn.k_proj', 'down_proj']}),
    ('llama3', 'language', 'scalar', ALL | {'use_rslora': True}),
    ('llama3', 'scalar', 'scalar', {'target_modules': ['o_proj', 'up_proj', 'gate_proj']}),
    ('llama32', 'language', 'scalar', {'target_modules': ['k_proj'], 'lora_alpha': 3}),
    ('qwen3', 'language', 'scalar', ALL),
    ('phi3', 'language', 'language', ALL | {'use_rslora': True}),
    ('phi3', 'scalar', 'scalar', {'target_modules': ['qkv_proj', 'down_proj']}),
  ],
)
def test_outputs_both_ways(peft, kind, base_head, head, fields, tmp_path):
  """An adapter of peft gives its outputs here; saved here it gives them in peft again."""
  base = hf_models.write(tmp_path / 'base', kind, base_head, vocab_size=320)
  tokenizers.write_tokenizer(base)
  model = _wrapped(peft, base, head, **fields)
  model.save_pretrained(tmp_path / 'theirs')
  expected = _their_outputs(model)
  config = dataclasses.replace(reader.load_config(tmp_path / 'theirs'), remat='none')
  params = reader.load_params(tmp_path / 'theirs', config, head)
  _assert_close(_our_outputs(params, config, head), expected)
  trained = lora.trained_params(params, config.lora)
  ours = tmp_path / 'ours'
  adapter_writer.save_adapter(
    ours,
    trained,
    config,
    head,
    base=str(base),
    source=base,
    card=model_card.Card(),
    tokenizer=load_tokenizer(str(base)),
  )
  automatic = {'language': peft.AutoPeftModelForCausalLM}.get(
    head, peft.AutoPeftModelForSequenceClassification
  )
  with _without_warnings_of_keys():
    again = peft.PeftModel.from_pretrained(MODELS[head].from_pretrained(base, num_labels=1), ours)
    by_name = automatic.from_pretrained(ours, num_labels=1)
  # Sums over the blocks of a fused matrix have more terms, of which the others are 0.
  same = _assert_close if kind == 'phi3' else np.testing.assert_array_equal
  same(_their_outputs(again), expected)
  same(_their_outputs(by_name), expected)
  merged = merge.merge_adapter(ours, tmp_path / 'merged')
  _assert_close(_their_outputs(MODELS[head].from_pretrained(merged)), expected)
  plain = reader.load_config(merged, remat='none')
  _assert_close(_our_outputs(reader.load_params(merged, plain, head), plain, head), expected)


@pytest.mark.parametrize('rs', [False, True])
def test_a_drawn_adapter_is_the_base(peft, rs, llama3, tmp_path):
  """B is 0 in both; A has peft's distribution, U(-1/√in, 1/√in)."""
  model = peft.get_peft_model(
    MODELS['language'].from_pretrained(llama3),
    peft.LoraConfig(r=16, use_rslora=rs, target_modules=['q_proj'], task_type='CAUSAL_LM'),
  )
  theirs = [p.detach().numpy() for n, p in model.named_parameters() if 'lora_A' in n]
  bound = np.abs(np.concatenate(theirs)).max()
  assert 0.95 * 32**-0.5 < bound <= 32**-0.5
  model.save_pretrained(tmp_path / 'a')
  config = reader.load_config(tmp_path / 'a')
  assert config.lora == Lora(16, 8.0, ('q_proj',), rs)
  ours = _our_outputs(reader.load_params(tmp_path / 'a', config, 'language'), config, 'language')
  base = dataclasses.replace(config, lora=None)
  plain = _our_outputs(reader.load_params(llama3, base, 'language'), base, 'language')
  np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize(
  ('fields', 'weight_decay'), [(ALL, 0.0), (ALL | {'use_rslora': True}, 0.1), (HEADED, 0.1)]
)
def test_two_optimizer_steps_equal_pefts(peft, fields, weight_decay, llama3, tmp_path):
  """The same batch, AdamW and clipping on the same adapter of a frozen base."""
  settings = Optimizer(
    learning_rate=1e-2,
    warmup_ratio=0.0,
    min_lr_ratio=1.0,
    weight_decay=weight_decay,
    decayed_weights='all',
    max_grad_norm=1.0,
  )
  model = _wrapped(peft, llama3, 'language', **fields)
  model.save_pretrained(tmp_path / 'before')
  config = dataclasses.replace(reader.load_config(tmp_path / 'before'), remat='none')
  params = reader.load_params(tmp_path / 'before', config, 'language')
  base, trained = params, lora.trained_params(params, config.lora)

  @jax.jit
  def step(state):
    def loss(own):
      return -jnp.mean(heads.token_logprobs(base | own, jnp.asarray(IDS), config)[0][:, 1:])

    value, grads = jax.value_and_grad(loss)(state.params)
    return apply_update(state, grads, value, settings, 2)

  state = init_state(trained, settings, 2)
  weights = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(
    weights,
    lr=settings.learning_rate,
    betas=(settings.beta1, settings.beta2),
    eps=settings.epsilon,
    weight_decay=weight_decay,
  )
  for _ in range(2):
    state, metrics = step(state)
    optimizer.zero_grad()
    logits = model(TORCH_IDS).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TORCH_IDS[:, 1:].flatten()).backward()
    norm = torch.nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
    np.testing.assert_allclose(float(metrics.mean['grad_norm']), float(norm), rtol=1e-4)
    optimizer.step()
  model.save_pretrained(tmp_path / 'after')
  after = adapter.read_adapter(tmp_path / 'after')
  expected = adapter.load_trained(after, config, 'language', None)
  moved = 0
  for before, ours, theirs in zip(
    *(jax.tree.leaves(tree) for tree in (trained, state.params, expected)), strict=True
  ):
    # Adam's step is the gradient by its own size: what is 0 up to rounding has any sign.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)
    moved = max(moved, np.abs(ours - before).max())
  assert moved > 1e-2


@pytest.mark.parametrize(
  ('head', 'fields'),
  [('language', {}), ('language', {'modules_to_save': ['lm_head']}), ('scalar', {})],
  ids=['language', 'headed', 'scalar'],
)
def test_the_card_runs(peft, head, fields, tmp_path):
  """The code of README.md loads what was written, and says what peft's model says."""
  base = hf_models.write(tmp_path / 'base', vocab_size=320)
  tokenizers.write_tokenizer(base)
  own = hf_models.write_adapter(tmp_path / 'theirs', base, head, **fields)
  config = reader.load_config(own)
  tokenizer = load_tokenizer(str(base))
  adapter_writer.save_adapter(
    tmp_path / 'mine',
    adapter.load_trained(adapter.read_adapter(own), config, head, None),
    config,
    head,
    base=str(base),
    source=base,
    card=model_card.Card(),
    tokenizer=tokenizer,
  )
  code = (tmp_path / 'mine' / 'README.md').read_text().split('```python\n')[1].split('```')[0]
  assert code.count('model_name = "mine"') == 1
  code = code.replace('"mine"', json.dumps(str(tmp_path / 'mine'))).replace('128', '8')
  names, printed = {}, io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(code, names)
  assert isinstance(names['model'], peft.PeftModel)
  if head == 'language':
    assert set(tokenizer.stop_ids) <= set(names['model'].generation_config.eos_token_id)
    new = names['outputs'][0, names['inputs']['input_ids'].shape[1] :]
    assert printed.getvalue().rstrip('\n') == tokenizer.decode(new).rstrip('\n') and len(new)
    params = reader.load_params(own, config, head)
    logits = heads.logits(params, jnp.asarray(names['inputs']['input_ids'].numpy()), config)
    with torch.no_grad():
      theirs = names['model'](names['inputs']['input_ids']).logits.numpy()
    _assert_close(np.asarray(logits), theirs)
  else:
    ids = names['inputs']['input_ids'].numpy()
    score = heads.scores(reader.load_params(own, config, head), jnp.asarray(ids), config)[0, -1]
    np.testing.assert_allclose(
      names['model'](names['inputs']['input_ids']).logits.item(), float(score), rtol=1e-5
    )


def test_all_targets_are_pefts(peft, llama3):
  """What peft takes for all linear layers of a Llama is what config.lora takes."""
  model = _wrapped(peft, llama3, 'language', target_modules='all-linear')
  names = {name.rpartition('.')[2] for name in model.peft_config['default'].target_modules}
  assert names == set(LORA_TARGETS)
