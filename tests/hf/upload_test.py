"""Uploads to a fake hub on localhost, through huggingface_hub itself."""

import json

import pytest
from fixtures import fake_hub, hf_models
from huggingface_hub import constants

from segjax.errors import UserError
from segjax.hf import cli, upload
from segjax.jobs import demo, evaluate
from segjax.report import html_report, stage_history


@pytest.fixture
def hub(monkeypatch, tmp_path):
  with fake_hub.serve(monkeypatch, tmp_path) as server:
    yield server


@pytest.fixture
def model(tmp_path):
  """A model in the directory of a run, as a finished run leaves it."""
  directory = hf_models.write(tmp_path / 'run' / 'ppo' / 'model')
  (directory / 'README.md').write_text('---\nlicense: mit\n---\n# card\n')
  (directory / 'shard.safetensors.partial-1').write_text('of a write that was killed')
  (directory.parent / 'stage.json').write_text('{}')
  (directory.parent / 'metrics.jsonl').write_text('')
  (tmp_path / 'run' / 'report.html').write_text('<html></html>')
  (tmp_path / 'run' / 'evaluate').mkdir()
  (tmp_path / 'run' / 'evaluate' / 'results.json').write_text('{"gold": 1.5}')
  return directory


def _files(model):
  own = {path.name: path.read_bytes() for path in model.iterdir() if 'partial' not in path.name}
  return own | {'report.html': b'<html></html>', 'results.json': b'{"gold": 1.5}'}


def _push(*arguments):
  return cli.main(['push', *map(str, arguments)])


def test_names_are_those_that_a_run_writes():
  assert html_report.REPORT_FILE in upload.RUN_FILES['report.html']
  assert evaluate.JOB.outputs[0] == 'results.json' == demo._RESULTS_FILE
  assert upload.RUN_FILES['results.json'] == ('results.json', 'evaluate/results.json')
  assert upload._STAGE_FILE == stage_history.STAGE_FILE


def test_model_card_and_report_arrive_in_one_commit(hub, model, capsys):
  assert _push(model, 'me/my-model') == 0
  assert hub.files['me/my-model'] == _files(model)
  assert hub.is_private['me/my-model']
  assert hub.commits['me/my-model'] == ['Upload ppo/model by segjax']
  assert f'{hub.address}/me/my-model' in capsys.readouterr().out


def test_a_later_model_replaces_the_weights(hub, model):
  old = {'model-00001-of-00002.safetensors': b'x', 'model.safetensors.index.json': b'{}'}
  hub.files['lab/it'], hub.commits['lab/it'] = {**old, 'notes.md': b'mine'}, []
  assert _push(model, 'lab/it', '--public') == 0
  assert hub.files['lab/it'] == _files(model) | {'notes.md': b'mine'}
  assert len(hub.commits['lab/it']) == 1


def test_public_is_asked_for(hub, model):
  assert _push(model, 'me/open', '--public') == 0
  assert not hub.is_private['me/open']


def test_dry_run_asks_the_hub_nothing(hub, model, capsys):
  assert _push(model, 'me/my-model', '--dry_run') == 0
  assert not hub.requests and not hub.files
  out = capsys.readouterr().out
  assert all(name in out for name in _files(model)) and 'partial' not in out
  assert f'in {len(_files(model))} files' in out


def test_a_failed_upload_says_how_to_try_again(hub, model, capsys):
  hub.failures = 1
  before = _files(model)
  assert _push(model, 'me/my-model', '--public') == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and '507' in error
  assert f'`segjax convert push {model} me/my-model --public`' in error
  assert not hub.files['me/my-model'] and _files(model) == before
  command = error.partition('`segjax convert ')[2].partition('`')[0].split()
  assert cli.main(command) == 0
  assert hub.files['me/my-model'] == before


@pytest.mark.parametrize('name', ['model', 'a/b/c', 'me/', '/x', 'me/a b', 'me/..', 'me/x--y', ''])
def test_names_that_the_hub_refuses(hub, name):
  with pytest.raises(UserError, match='is not a name on the Hugging Face hub; give OWNER/NAME'):
    upload.Repository(name)
  assert not hub.requests


def _refusal(name='me/x'):
  with pytest.raises(UserError) as caught:
    upload.Repository(name).check_access()
  assert '\n' not in str(caught.value) and 'hf_secret' not in str(caught.value)
  return str(caught.value)


def test_no_token(hub, monkeypatch):
  monkeypatch.delenv('HF_TOKEN')
  assert 'there is no token' in _refusal() and not hub.requests


def test_wrong_tokens(hub):
  assert 'the token belongs to me, lab' in _refusal('you/x')
  upload.Repository('Lab/x').check_access()
  hub.account['auth']['accessToken']['role'] = 'read'
  assert 'may only read' in _refusal()
  hub.account = None
  assert 'refuses the token' in _refusal()


def test_the_hub_does_not_answer(hub, monkeypatch):
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://localhost:9')
  assert 'did not answer' in _refusal()


def test_directories_without_a_model(hub, tmp_path, capsys):
  assert _push(tmp_path / 'nothing', 'me/x') == 1
  assert 'is not a directory' in capsys.readouterr().err
  assert _push(tmp_path, 'me/x') == 1
  assert 'has no safetensors' in capsys.readouterr().err
  assert not hub.requests


def test_an_adapter_of_a_local_base_is_named(hub, tmp_path, capsys):
  base = hf_models.write(tmp_path / 'base')
  adapter = hf_models.write_adapter(tmp_path / 'adapter', base, base_model_name_or_path=str(base))
  assert _push(adapter, 'me/x') == 0
  assert f'warning: adapter_config.json names its base by a local path, {base}' in (
    capsys.readouterr().out
  )
  config = json.loads((adapter / 'adapter_config.json').read_text())
  (adapter / 'adapter_config.json').write_text(
    json.dumps(config | {'base_model_name_or_path': 'owner/base'})
  )
  assert _push(adapter, 'me/x') == 0
  assert 'warning' not in capsys.readouterr().out


def test_push_public_alone():
  with pytest.raises(UserError, match='--push_public needs --push_to'):
    upload.from_flags('', True)
  assert upload.from_flags('', False) is None
