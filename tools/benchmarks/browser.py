"""Chromium without a window, driven over a pipe: for the tests and the timing of report.html.

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
_PATIENCE = 60.0  # seconds for an answer


def found() -> str | None:
  """The browser on PATH, if there is one."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
  """One tab; `complaints` are its console errors, exceptions and refused requests."""

  def __init__(self, program: str):
    self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The shell puts the pipes where the browser looks for them.
    command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    self._process = subprocess.Popen(
      ['bash', '-c', command, 'bash', program, *_FLAGS, f'--user-data-dir={self._profile.name}'],
      pass_fds=(theirs_in, theirs_out),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    self._out, self._in = os.fdopen(ours_out, 'wb', 0), os.fdopen(ours_in, 'rb', 0)
    os.set_blocking(ours_in, False)
    self._number, self._session, self._buffer = 0, None, b''
    self.complaints: list[str] = []
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
      answer = self._receive()
      if answer.get('id') == self._number:
        if 'error' in answer:
          raise RuntimeError(f'{method}: {answer["error"]}')
        return answer['result']
      self._note(answer)

  def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> float:
    """Opens a file; returns the seconds until its table could be used and was drawn."""
    self.size(width, height)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self.send('Emulation.setEmulatedMedia', features=[scheme])
    begun = time.monotonic()
    self.send('Page.navigate', url=path.absolute().as_uri())
    while not self.run('document.documentElement?.dataset.ready ?? ""'):
      if time.monotonic() - begun > _PATIENCE:
        raise TimeoutError(f'{path} was not ready: {self.complaints}')
    self.run('new Promise((done) => requestAnimationFrame(() => setTimeout(done)))')
    return time.monotonic() - begun

  def size(self, width: int, height: int) -> None:
    """Of the window, in CSS pixels; a narrow one is a phone's."""
    self.send(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )

  def run(self, script: str) -> Any:
    """The value of a JavaScript expression; a promise is waited for."""
    found = self.send(
      'Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True, userGesture=True
    )
    if 'exceptionDetails' in found:
      raise RuntimeError(f'{script}: {found["exceptionDetails"]}')
    return found['result'].get('value')

  def point(self, x: float, y: float) -> None:
    """Moves the mouse there."""
    self.send('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def press(self, key: str) -> None:
    """Presses a key, as Tab or ArrowRight."""
    for kind in ('keyDown', 'keyUp'):
      self.send('Input.dispatchKeyEvent', type=kind, key=key, code=key)

  def type(self, text: str) -> None:
    """Writes into what has the focus."""
    self.send('Input.insertText', text=text)

  def picture(self, path: Path, whole: bool = False) -> None:
    """A screenshot of the window, or of the whole page."""
    found = self.send('Page.captureScreenshot', captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(found['data']))

  def _receive(self) -> dict[str, Any]:
    begun = time.monotonic()
    while b'\0' not in self._buffer:
      if piece := self._in.read(1 << 20):
        self._buffer += piece
      elif time.monotonic() - begun > _PATIENCE or self._process.poll() is not None:
        raise TimeoutError('the browser does not answer')
      else:
        time.sleep(0.002)
    message, _, self._buffer = self._buffer.partition(b'\0')
    return json.loads(message)

  def _note(self, event: dict[str, Any]) -> None:
    params = event.get('params', {})
    if event.get('method') == 'Runtime.exceptionThrown':
      self.complaints.append(str(params['exceptionDetails']))
    if event.get('method') == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
      self.complaints.append(params['entry']['text'])
    if event.get('method') == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning'):
      self.complaints.append(str(params['args']))
    if event.get('method') == 'Network.requestWillBeSent':
      url = params['request']['url']
      if not url.startswith(('file:', 'data:', 'blob:', 'about:')):
        self.complaints.append(f'asks the network for {url}')
