"""Fake buckets: with this folder on PYTHONPATH, `gs://` is the directory that FAKE_BUCKETS names.

Files are accessed through fsspec, which etils.epath and `segjax.run.bucket_mirror` use, and through
the JSON interface of Cloud Storage over HTTP, which TensorStore, and thus Orbax, uses. As on a
bucket, an object appears completely or not at all.
"""

import io
import json
import os
import sys
import threading
import types
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

ROOT = Path(os.environ['FAKE_BUCKETS'])


def put(path, data):
  """Writes an object atomically."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = ROOT / f'.partial-{uuid.uuid4().hex}'
  partial.write_bytes(data)
  partial.replace(path)


class AtomicFile(io.BytesIO):
  """A file that appears when it is closed."""

  def __init__(self, path):
    super().__init__()
    self._path = Path(path)

  def close(self):
    if not self.closed:
      put(self._path, self.getvalue())
    super().close()


class Files(LocalFileSystem):
  """The local file system with atomic writes."""

  def _open(self, path, mode='rb', **_):
    return AtomicFile(path) if 'w' in mode else super()._open(path, mode)

  def put_file(self, lpath, rpath, **_):
    put(Path(self._strip_protocol(rpath)), Path(lpath).read_bytes())


class Buckets(DirFileSystem):
  """The file system of gs:// in the directory."""

  protocol = ('gs', 'gcs')
  cachable = False

  def __init__(self, **_):
    super().__init__(path=str(ROOT), fs=Files(auto_mkdir=True))

  @classmethod
  def _strip_protocol(cls, path):
    if isinstance(path, list):
      return [cls._strip_protocol(p) for p in path]
    path = os.fspath(path)
    for scheme in ('gs://', 'gcs://'):
      path = path.removeprefix(scheme)
    return path.rstrip('/')

  def _join(self, path):
    return super()._join(self._strip_protocol(path))


class Handler(BaseHTTPRequestHandler):
  """Reads, writes, lists and deletes objects for TensorStore."""

  protocol_version = 'HTTP/1.1'

  def _reply(self, code, data=b'', headers=()):
    self.send_response(code)
    for name, value in headers:
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def _parse_path(self):
    parts = urlsplit(self.path)
    _, _, rest = parts.path.partition('/storage/v1/b/')
    bucket, _, name = rest.partition('/o')
    query = {key: values[0] for key, values in parse_qs(parts.query).items()}
    return ROOT / bucket, unquote(name.lstrip('/')), query

  def do_GET(self):
    bucket, name, query = self._parse_path()
    if not name:
      prefix = query.get('prefix', '')
      files = sorted(str(p.relative_to(bucket)) for p in bucket.rglob('*') if p.is_file())
      items = [_metadata(bucket / file, file) for file in files if file.startswith(prefix)]
      return self._reply(200, json.dumps({'items': items}).encode())
    path = bucket / name
    if not path.is_file():
      return self._reply(404)
    if query.get('alt') != 'media':
      return self._reply(200, json.dumps(_metadata(path, name)).encode())
    data, code, headers = path.read_bytes(), 200, [('x-goog-generation', _generation(path))]
    if span := self.headers.get('Range'):
      first, _, last = span.removeprefix('bytes=').partition('-')
      start, size = int(first or len(data) - int(last)), len(data)
      end = min(int(last), size - 1) if last and first else size - 1
      data, code = data[start : end + 1], 206
      headers.append(('Content-Range', f'bytes {start}-{end}/{size}'))
    return self._reply(code, data, headers)

  def do_POST(self):
    bucket, _, query = self._parse_path()
    data = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    path = bucket / query['name']
    put(path, data)
    self._reply(200, json.dumps(_metadata(path, query['name'])).encode())

  def do_DELETE(self):
    bucket, name, _ = self._parse_path()
    (bucket / name).unlink(missing_ok=True)
    self._reply(204)

  def log_message(self, *_):
    pass


def _generation(path):
  return str(path.stat().st_mtime_ns)


def _metadata(path, name):
  return {'name': name, 'generation': _generation(path), 'size': str(path.stat().st_size)}


def _fake_google_cloud():
  """Replaces google-cloud-storage, which Orbax asks only whether folders are hierarchical."""
  bucket = types.SimpleNamespace(hierarchical_namespace_enabled=False)
  storage = types.ModuleType('google.cloud.storage')
  storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: bucket)
  cloud = types.ModuleType('google.cloud')
  cloud.storage = storage
  sys.modules |= {'google.cloud': cloud, 'google.cloud.storage': storage}


_fake_google_cloud()
for _name in ('gs', 'gcs'):
  fsspec.register_implementation(_name, Buckets, clobber=True)
_server = ThreadingHTTPServer(('localhost', 0), Handler)
os.environ['TENSORSTORE_GCS_HTTP_URL'] = f'http://localhost:{_server.server_port}'
os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'none'
threading.Thread(target=_server.serve_forever, daemon=True).start()
