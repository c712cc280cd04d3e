"""Downloads from a fake hub on localhost, through huggingface_hub itself."""

import ast
import collections
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fixtures import hf_models
from huggingface_hub import constants

from segjax.hf import checkpoint, reader

REPOSITORY = Path(__file__).resolve().parents[2]
RESOLVE = """
import sys
from segjax.hf import checkpoint, reader
print(checkpoint.resolve_checkpoint(sys.argv[1]))
"""
REVISION = '1' * 40


class Hub(http.server.ThreadingHTTPServer):
  """Serves `repositories` (name to {'files', 'status', 'code', 'config'}) and counts requests."""

  def __init__(self):
    super().__init__(('localhost', 0), _Handler)
    self.repositories = {}
    self.fetched = collections.Counter()


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    parts = self.path.partition('?')[0].strip('/').split('/')
    api = parts[0] == 'api'
    owner, name, *rest = [*(parts[2:] if api else parts), '', '']
    rest = rest[:-2]
    repository = self.server.repositories.get(f'{owner}/{name}')
    if repository is None:
      return self._answer(404, b'', {'X-Error-Code': 'RepoNotFound'})
    files = repository.get('files', {})
    if repository.get('gated') and (not api or rest == ['auth-check']):
      return self._answer(403, b'', {'X-Error-Code': 'GatedRepo'})
    if not api:
      content = files['/'.join(rest[2:])]
      if self.command == 'GET':
        self.server.fetched[rest[-1]] += 1
      etag = hashlib.sha256(content).hexdigest()
      return self._answer(200, content, {'ETag': f'"{etag}"', 'X-Repo-Commit': REVISION})
    if rest[:1] == ['tree']:
      value = [
        {'type': 'file', 'path': file, 'size': len(content), 'oid': file}
        for file, content in files.items()
      ]
    else:
      value = {
        'id': f'{owner}/{name}',
        'sha': REVISION,
        'siblings': [{'rfilename': file} for file in files],
        'config': repository.get('config', {}),
      }
    return self._answer(200, json.dumps(value).encode(), {'Content-Type': 'application/json'})

  def _answer(self, status, content, headers):
    self.send_response(status)
    for key, value in (headers | {'Content-Length': str(len(content))}).items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)


@pytest.fixture
def hub():
  server = Hub()
  # The default interval of 0.5 s is what shutdown() waits.
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture
def cache(hub, tmp_path, monkeypatch):
  """Points huggingface_hub of this process to `hub` and to an empty cache."""
  settings = {
    'ENDPOINT': f'http://localhost:{hub.server_address[1]}',
    'HF_HUB_CACHE': str(tmp_path / 'home' / 'hub'),
    'HF_HUB_DISABLE_XET': True,
    'HF_HUB_OFFLINE': False,
  }
  for name, value in settings.items():
    monkeypatch.setattr(constants, name, value)
  monkeypatch.setenv('no_proxy', 'localhost')
  return tmp_path / 'home'


def _start(hub, name, cache):
  """Starts a process that resolves a hub id."""
  env = os.environ | {
    'HF_ENDPOINT': f'http://localhost:{hub.server_address[1]}',
    'HF_HOME': str(cache),
    'HF_HUB_DISABLE_XET': '1',
    'HF_HUB_OFFLINE': '0',
  }
  command = [sys.executable, '-c', RESOLVE, name]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(command, cwd=REPOSITORY, env=env, **pipes)


def _files(directory):
  return {file.name: file.read_bytes() for file in directory.iterdir()}


def _error(name):
  """Returns the message, one line, with which a hub id is refused."""
  with pytest.raises(ValueError) as caught:
    checkpoint.resolve_checkpoint(name)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_processes_of_a_host_download_once(hub, cache, monkeypatch, tmp_path):
  source = hf_models.write(tmp_path / 'source')
  ignored = {'pytorch_model.bin': b'x', 'code.py': b'x', 'original/consolidated.safetensors': b'x'}
  hub.repositories['owner/tiny'] = {'files': _files(source) | ignored}
  processes = [_start(hub, 'owner/tiny', cache) for _ in range(2)]
  directories = set()
  for process in processes:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    directories.add(out.strip())
  (directory,) = directories
  hf_models.assert_same_tensors(source, Path(directory))
  assert hub.fetched == dict.fromkeys(_files(source), 1)
  # The cache serves it without the network, with and without huggingface_hub's offline mode.
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://localhost:9')
  assert checkpoint.resolve_checkpoint('owner/tiny') == Path(directory)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  assert checkpoint.resolve_checkpoint('owner/tiny') == Path(directory)


@pytest.mark.usefixtures('cache')
def test_gated_model(hub):
  hub.repositories['meta-llama/Llama-3.1-8B'] = {'gated': True, 'files': {'config.json': b'{}'}}
  message = _error('meta-llama/Llama-3.1-8B')
  assert 'https://huggingface.co/meta-llama/Llama-3.1-8B' in message
  assert 'hf auth login' in message
  assert not hub.fetched


@pytest.mark.usefixtures('cache')
def test_missing_model():
  message = _error('owner/nothing')
  assert message.startswith('owner/nothing is neither a local directory nor a model')
  assert 'hf auth login' in message


@pytest.mark.usefixtures('cache')
def test_unreachable_hub(monkeypatch):
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://localhost:9')
  message = _error('owner/nothing')
  assert 'nor in the cache' in message
  assert 'network' in message


@pytest.mark.parametrize(
  ('repository', 'message'),
  [
    ({'files': {'pytorch_model.bin': b''}}, "is a pickle.*from_pretrained('owner/a')"),
    ({'files': {'model.gguf': b''}}, 'has neither model.safetensors'),
    (
      {'files': {'adapter_config.json': b'', 'adapter_model.bin': b''}},
      'is a pickle.*AutoPeftModelForCausalLM',
    ),
    (
      {'files': {'model.safetensors': b''}, 'config': {'model_type': 'mixtral'}},
      "model_type is 'mixtral'; only llama",
    ),
  ],
)
@pytest.mark.usefixtures('cache')
def test_refuses_before_downloading(repository, message, hub):
  hub.repositories['owner/a'] = repository
  error = _error('owner/a')
  assert all(part in error for part in message.split('.*'))
  assert not hub.fetched


@pytest.mark.campaign  # two processes download
def test_an_adapter_and_its_base(hub, cache, tmp_path):
  source = hf_models.write(tmp_path / 'source')
  own = hf_models.write_adapter(tmp_path / 'own', source, base_model_name_or_path='owner/base')
  hub.repositories |= {
    'owner/base': {'files': _files(source)},
    'owner/own': {'files': _files(own), 'config': {'peft': {'task_type': 'CAUSAL_LM'}}},
  }
  for process in [_start(hub, name, cache) for name in hub.repositories]:
    assert process.wait(60) == 0, process.stderr.read()
  config = reader.load_config('owner/own')
  assert config.lora.rank == 4
  here = json.loads((own / 'adapter_config.json').read_text())
  (own / 'adapter_config.json').write_text(
    json.dumps(here | {'base_model_name_or_path': str(source)})
  )
  hf_models.assert_same_params(
    reader.load_params('owner/own', config, 'language'),
    reader.load_params(own, config, 'language'),
  )


def test_remote_code_is_never_trusted():
  for file in (*REPOSITORY.glob('segjax/**/*.py'), *REPOSITORY.glob('tools/**/*.py')):
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
      assert not (isinstance(node, ast.keyword) and node.arg == 'trust_remote_code'), file
