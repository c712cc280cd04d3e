"""A hub of our own on localhost, asked through huggingface_hub in processes of their own."""

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

REPOSITORY = Path(__file__).resolve().parents[2]
RESOLVE = """
import sys
from segjax.hf import checkpoint
try:
  print(checkpoint.resolve(sys.argv[1]))
except ValueError as error:
  sys.exit(f'error: {error}')
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
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture
def resolve(hub, tmp_path):
  """Starts a process that resolves a hub id, with a cache of its own."""
  env = os.environ | {
    'HF_ENDPOINT': f'http://localhost:{hub.server_address[1]}',
    'HF_HOME': str(tmp_path / 'home'),
    'HF_HUB_DISABLE_XET': '1',
    'HF_HUB_OFFLINE': '0',
    'no_proxy': 'localhost',
  }

  def start(name, **more):
    return subprocess.Popen(
      [sys.executable, '-c', RESOLVE, name],
      cwd=REPOSITORY,
      env=env | more,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


def _files(directory):
  return {file.name: file.read_bytes() for file in directory.iterdir()}


def _error(process):
  """The only line of its error, which must end it."""
  out, err = process.communicate(timeout=60)
  lines = [line for line in err.splitlines() if line.strip()]
  assert process.returncode == 1
  assert not out
  assert len(lines) == 1, err
  return lines[0]


def test_processes_of_a_host_download_once(hub, resolve, tmp_path):
  source = hf_models.write(tmp_path / 'source')
  more = {'pytorch_model.bin': b'x', 'code.py': b'x', 'original/consolidated.safetensors': b'x'}
  hub.repositories['owner/tiny'] = {'files': _files(source) | more}
  started = [resolve('owner/tiny') for _ in range(2)]
  found = set()
  for process in started:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found.add(out.strip())
  assert len(found) == 1
  hf_models.assert_same_tensors(source, Path(*found))
  assert hub.fetched == dict.fromkeys(_files(source), 1)
  offline = resolve('owner/tiny', HF_HUB_OFFLINE='1')
  assert offline.communicate(timeout=60)[0].strip() in found


def test_gated_model(hub, resolve):
  hub.repositories['meta-llama/Llama-3.1-8B'] = {'gated': True, 'files': {'config.json': b'{}'}}
  message = _error(resolve('meta-llama/Llama-3.1-8B'))
  assert 'https://huggingface.co/meta-llama/Llama-3.1-8B' in message
  assert 'hf auth login' in message
  assert not hub.fetched


def test_missing_model(hub, resolve):
  message = _error(resolve('owner/nothing'))
  assert message.startswith('error: owner/nothing is neither a local directory nor a model')
  assert 'hf auth login' in message


def test_unreachable_hub(resolve):
  message = _error(resolve('owner/nothing', HF_ENDPOINT='http://localhost:9'))
  assert 'nor in the cache' in message
  assert 'network' in message


@pytest.mark.parametrize(
  ('repository', 'message'),
  [
    ({'files': {'pytorch_model.bin': b''}}, "is a pickle.*from_pretrained('owner/a')"),
    ({'files': {'model.gguf': b''}}, 'has neither model.safetensors'),
    (
      {'files': {'model.safetensors': b''}, 'config': {'model_type': 'mixtral'}},
      "model_type is 'mixtral'; only llama",
    ),
  ],
)
def test_refuses_before_downloading(repository, message, hub, resolve):
  hub.repositories['owner/a'] = repository
  found = _error(resolve('owner/a'))
  assert all(part in found for part in message.split('.*'))
  assert not hub.fetched


def test_nowhere_is_remote_code_trusted():
  for file in (*REPOSITORY.glob('segjax/**/*.py'), *REPOSITORY.glob('tools/**/*.py')):
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
      assert not (isinstance(node, ast.keyword) and node.arg == 'trust_remote_code'), file
