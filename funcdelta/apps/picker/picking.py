"""Serve the page on the loopback address until it hands back its answer, and leave nothing running."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from ...errors import ConfigError, PickError
from ...methods.config import BaseDeltaConfig
from .naming import exact_names, short_names

if TYPE_CHECKING:
    from .app import Picking

HOST = "127.0.0.1"


def pick(
    model: nn.Module,
    port: int = 0,
    open_browser: bool | Callable[[str], object] = True,
    timeout: float | None = None,
    *,
    config: BaseDeltaConfig | None = None,
    compact: bool = False,
) -> list[str]:
    """Pick modules of ``model`` on a web page; gives names for ``modified_modules`` that match exactly those.

    The address is printed; the call waits until the page says "Done". The page is served to this machine alone,
    under a random token, and closes itself. Needs the extra ``web``.

    Args:
        port: of the loopback address; 0 is any free one.
        open_browser: whether the page is opened; a function is called with its address instead.
        timeout: the longest to wait, in seconds.
        config: whose figures the page shows first, instead of a method's defaults.
        compact: give the short names that the page shows instead of one full path a module. (A path that is also
            the end of another one is given as ``[r]^path$``.)

    Raises:
        PickError: cancelled on the page, timed out, the port is in use, or the web library is not installed.
        KeyboardInterrupt: on Ctrl-C, after the server has been closed.

    >>> import json, urllib.request
    >>> def click(address):  # stands for a person at the page
    ...     body = json.dumps({"paths": ["0", "2"]}).encode()
    ...     json_type = {"Content-Type": "application/json"}
    ...     urllib.request.urlopen(urllib.request.Request(address + "done", body, json_type)).close()
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> fd.pick(model, open_browser=click)
    Pick modules of Sequential at http://127.0.0.1:.../ (Ctrl-C cancels)
    ['0', '2']
    """
    _check(model, port)
    if importlib.util.find_spec("flask") is None:
        raise PickError('The page needs Flask, which is not installed. Run: pip install "funcdelta[web]"')
    from .app import Picking

    picking = Picking(model, config)
    with served(picking, port) as address:
        print(f"Pick modules of {type(model).__name__} at {address} (Ctrl-C cancels)", flush=True)
        if callable(open_browser):
            open_browser(address)
        elif open_browser:
            _open(address)
        if not _wait(picking, timeout):
            raise PickError(f"Nothing was picked within {timeout:g} s; timeout=None waits for as long as it takes.")
    if picking.answer is None:
        raise PickError("Picking was cancelled on the page; nothing was picked.")
    return (short_names if compact else exact_names)(picking.paths, picking.answer)


@contextmanager
def served(picking: Picking, port: int = 0) -> Iterator[str]:
    """The page's address, while it is served on a thread of its own.

    >>> from funcdelta.apps.picker.app import Picking
    >>> with served(Picking(torch.nn.Linear(2, 2))) as address:
    ...     address.startswith("http://127.0.0.1:")
    True
    """
    from werkzeug.serving import WSGIRequestHandler, make_server

    from .app import make_app

    class Quiet(WSGIRequestHandler):
        # One request a connection: none may outlive the server.
        protocol_version = "HTTP/1.0"

        def log(self, type: str, message: str, *args: object) -> None:
            """Nothing: the token must not end up in a log."""

    with _listening(port) as listener:
        bound = listener.getsockname()[1]
        server = make_server(HOST, bound, make_app(picking), True, request_handler=Quiet, fd=listener.fileno())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{bound}/{picking.token}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _check(model: nn.Module, port: int) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; expected an nn.Module.")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ConfigError(f"port={port!r}: write a number from 0 (any free port) to 65535.")
    if not any(path for path, _ in model.named_modules()):
        raise ConfigError(f"{type(model).__name__} has no modules inside it to pick from.")


def _listening(port: int) -> socket.socket:
    """A socket bound to the loopback address, before any library may exit the process over a port in use."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere it would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen(16)
    except OSError as error:
        listener.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise PickError(f"Port {port} of {HOST} {reason}: give another one, or port=0 for any free one.") from error
    return listener


def _open(address: str) -> None:
    """Open the address in a graphical browser, if there is one; the address has been printed anyway."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    # Text browsers run no scripts, and would take over the terminal.
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(address)


def _wait(picking: Picking, timeout: float | None) -> bool:
    """Whether the page was answered in time; in short waits, so that Ctrl-C gets through on every system."""
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    while not picking.closed and time.monotonic() < deadline:
        picking.ended.wait(min(0.5, deadline - time.monotonic()))
    if picking.closed:
        # Give the page time to receive the reply; if it has been closed already, its choice counts all the same.
        picking.ended.wait(1)
    return picking.closed
