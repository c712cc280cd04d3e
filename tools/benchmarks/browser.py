"""Drives a headless Chromium over a pipe, for the tests and the benchmark of report.html.

The DevTools protocol goes over file descriptors 3 and 4, so the standard library is enough.
https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
_FLAGS = (
  *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
  *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
  *('--disable-dev-shm-usage', '--hide-scrollbars', '--remote-debugging-pipe'),
)
_TIMEOUT = 60.0  # seconds for a reply


def find_browser() -> str | None:
  """Returns the path of a browser on PATH, None if there is none."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
  """One tab; `errors` holds its console errors, exceptions and requests to the network."""

  def __init__(self, program: str):
    self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    browser_in, own_out = os.pipe()
    own_in, browser_out = os.pipe()
    # The browser expects its pipes at descriptors 3 and 4, where only the shell can put them.
    command = f'exec "$@" 3<&{browser_in} 4>&{browser_out}'
    self._process = subprocess.Popen(
      ['bash', '-c', command, 'bash', program, *_FLAGS, f'--user-data-dir={self._profile.name}'],
      pass_fds=(browser_in, browser_out),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(browser_in)
    os.close(browser_out)
    self._out, self._in = os.fdopen(own_out, 'wb', 0), os.fdopen(own_in, 'rb', 0)
    os.set_blocking(own_in, False)
    self._number, self._session, self._buffer = 0, None, b''
    self.errors: list[str] = []
    target = self.send('Target.createTarget', url='about:blank')['targetId']
    self._session = self.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.send(f'{domain}.enable')

  def __enter__(self) -> 'Browser':
    return self

  def __exit__(self, *_: object) -> None:
    self._process.kill()
    self._process.wait()
    self._out.close()
    self._in.close()
    self._profile.cleanup()

  def send(self, method: str, **params: Any) -> dict[str, Any]:
    """Calls a method of the protocol and waits for its result."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    self._out.write(json.dumps(message).encode() + b'\0')
    while True:
      reply = self._receive()
      if reply.get('id') == self._number:
        if 'error' in reply:
          raise RuntimeError(f'{method}: {reply["error"]}')
        return reply['result']
      self._record_error(reply)

  def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> float:
    """Opens a file; returns the seconds until its table was drawn and could be used."""
    self.size(width, height)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self.send('Emulation.setEmulatedMedia', features=[scheme])
    begin = time.monotonic()
    self.send('Page.navigate', url=path.absolute().as_uri())
    while not self.run('document.documentElement?.dataset.ready ?? ""'):
      if time.monotonic() - begin > _TIMEOUT:
        raise TimeoutError(f'{path} was not ready: {self.errors}')
    self.run('new Promise((done) => requestAnimationFrame(() => setTimeout(done)))')
    return time.monotonic() - begin

  def size(self, width: int, height: int) -> None:
    """Sets the size of the window in CSS pixels; below 600 it behaves as a phone."""
    self.send(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )

  def run(self, script: str) -> Any:
    """Returns the value of a JavaScript expression; waits for a promise."""
    reply = self.send(
      'Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True, userGesture=True
    )
    if 'exceptionDetails' in reply:
      raise RuntimeError(f'{script}: {reply["exceptionDetails"]}')
    return reply['result'].get('value')

  def point(self, x: float, y: float) -> None:
    """Moves the mouse to a point."""
    self.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def press(self, key: str) -> None:
    """Presses a key, such as Tab or ArrowRight."""
    for kind in ('keyDown', 'keyUp'):
      self.send('Input.dispatchKeyEvent', type=kind, key=key, code=key)

  def type(self, text: str) -> None:
    """Types into the element that has the focus."""
    self.send('Input.insertText', text=text)

  def screenshot(self, path: Path, full_page: bool = False) -> None:
    """Writes a PNG of the window, or of the full page."""
    reply = self.send('Page.captureScreenshot', captureBeyondViewport=full_page)
    path.write_bytes(base64.b64decode(reply['data']))

  def _receive(self) -> dict[str, Any]:
    begin = time.monotonic()
    while b'\0' not in self._buffer:
      if data := self._in.read(1 << 20):
        self._buffer += data
      elif time.monotonic() - begin > _TIMEOUT or self._process.poll() is not None:
        raise TimeoutError(f'the browser did not reply within {_TIMEOUT:g} s')
      else:
        time.sleep(0.002)
    message, _, self._buffer = self._buffer.partition(b'\0')
    return json.loads(message)

  def _record_error(self, event: dict[str, Any]) -> None:
    params = event.get('params', {})
    if event.get('method') == 'Runtime.exceptionThrown':
      self.errors.append(str(params['exceptionDetails']))
    if event.get('method') == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
      self.errors.append(params['entry']['text'])
    if event.get('method') == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning'):
      self.errors.append(str(params['args']))
    if event.get('method') == 'Network.requestWillBeSent':
      url = params['request']['url']
      if not url.startswith(('file:', 'data:', 'blob:', 'about:')):
        self.errors.append(f'request to the network: {url}')
