"""The page's web application: a small JSON protocol behind a token, for one model and one answer.

``GET /<token>/`` is the page, ``/<token>/tree`` what it shows. ``POST /<token>/count``, ``usual``, ``done`` and
``cancel`` are its actions. Requests without the token, for another host or from another page get 403; once the page
has ended, every request gets 410. Flask is imported only here.
"""

from __future__ import annotations

import dataclasses
import functools
import hmac
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flask import Blueprint, Flask, Response, abort, jsonify, request
from torch import nn
from werkzeug.exceptions import HTTPException

from ...errors import FuncdeltaError
from ...methods.config import METHODS, BaseDeltaConfig
from ..inspect.folding import folded
from ..inspect.nodes import Node
from .choice import assess, usual
from .naming import paths_of

PAGE = Path(__file__).parent / "page"
FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that the page answers to, on any port: the near end of an ssh tunnel may use another one."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
AS_GIVEN = "as given"
"""The entry for the config of the delta that is being built, listed with every method's defaults."""


class Picking:
    """One question, answered once: the model, the methods, and in the end the chosen paths.

    Attributes:
        answer: the chosen paths; ``None`` until then, and after a cancel.
        ended: set once the answer (or the cancel) has been sent to the page.
    """

    def __init__(self, model: nn.Module, config: BaseDeltaConfig | None = None) -> None:
        self.model = model
        self.token = secrets.token_urlsafe(24)
        self.paths = paths_of(model)
        self.given = config
        self.answer: list[str] | None = None
        self.closed = False
        self.ended = threading.Event()
        # A delta is built for one request at a time; the answer is taken once.
        self.lock = threading.Lock()

    def config(self, method: str) -> BaseDeltaConfig:
        """The config that the page calls ``method``."""
        if method == AS_GIVEN and self.given is not None:
            return self.given
        if method not in METHODS:
            abort(400, f"Unknown method {method!r}.")
        return METHODS[method]()

    def methods(self) -> list[dict[str, str]]:
        """What the page offers: the given config first, then every registered method."""
        given = [{"value": AS_GIVEN, "label": f"{self.given.delta_type} ({AS_GIVEN})"}] if self.given else []
        return given + [{"value": name, "label": name} for name in METHODS]

    def close(self, answer: Sequence[str] | None) -> None:
        """Take the answer; only the first one counts."""
        with self.lock:
            if self.closed:
                abort(410, "This page has already handed back its answer.")
            self.answer = None if answer is None else list(answer)
            self.closed = True


def make_app(picking: Picking) -> Flask:
    """The application for one question.

    >>> picking = Picking(torch.nn.Sequential(torch.nn.Linear(4, 8)))
    >>> client = make_app(picking).test_client()
    >>> client.get("/", base_url="http://127.0.0.1:5000").status_code
    403
    >>> answer = client.post(f"/{picking.token}/count", base_url="http://127.0.0.1:5000",
    ...                      json={"method": "lora", "paths": ["0"]})
    >>> answer.json["sites"], answer.json["parameters"]
    (1, 96)
    """
    app = Flask("funcdelta.apps.picker", static_folder=None, template_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 16 * 2**20
    app.json.sort_keys = False  # pyright: ignore[reportAttributeAccessIssue]
    app.before_request(lambda: _guard(picking))
    app.after_request(_secured)
    app.register_error_handler(HTTPException, _as_json)
    app.register_blueprint(_routes(picking), url_prefix=f"/{picking.token}")
    return app


def _guard(picking: Picking) -> None:
    """Let in only requests with the token, to the loopback address, and from this page."""
    if urlsplit(f"//{request.host}").hostname not in LOOPBACK:
        abort(403, f"This page answers to {' and '.join(LOOPBACK)} only, not to {request.host!r}.")
    token = request.path.split("/")[1]
    if not hmac.compare_digest(token.encode(), picking.token.encode()):
        abort(403, "Open the whole address that was printed: it has a token after the port.")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        abort(403, f"This request comes from another page, {origin!r}.")
    if picking.closed:
        abort(410, "This page has already handed back its answer.")


def _secured(response: Response) -> Response:
    response.headers.update(HEADERS)
    return response


def _as_json(error: HTTPException) -> Response:
    text, cause = error.description, getattr(error, "original_exception", None)
    if cause is not None:
        text = f"This failed in Python, where the traceback is printed: {type(cause).__name__}: {cause}"
    response = error.get_response()
    response.data = jsonify(error=text).data
    response.content_type = "application/json"
    return response  # pyright: ignore[reportReturnType]


def _routes(picking: Picking) -> Blueprint:
    routes = Blueprint("picker", __name__)

    for name in FILES:
        routes.add_url_rule(f"/{name}", name.replace(".", "_") or "page", functools.partial(_file, name))

    @routes.get("/tree")
    def tree() -> Response:
        root = folded(picking.model)
        return jsonify(model=type(picking.model).__name__, methods=picking.methods(), root=node_data(root))

    @routes.post("/count")
    def count() -> Response:
        config = picking.config(_sent("method", str))
        with picking.lock:
            return jsonify(dataclasses.asdict(assess(picking.model, picking.paths, config, _chosen(picking))))

    @routes.post("/usual")
    def usual_sites() -> Response:
        config = picking.config(_sent("method", str))
        try:
            with picking.lock:
                return jsonify(paths=usual(picking.model, config))
        except FuncdeltaError as error:
            return jsonify(error=str(error))

    @routes.post("/done")
    def done() -> Response:
        chosen = _chosen(picking)
        if not chosen:
            abort(400, "Nothing is selected.")
        picking.close(chosen)
        return _last(picking, jsonify(count=len(chosen)))

    @routes.post("/cancel")
    def cancel() -> Response:
        _sent("cancel", bool)
        picking.close(None)
        return _last(picking, jsonify(count=0))

    return routes


def _file(name: str) -> Response:
    file, kind = FILES[name]
    return Response((PAGE / file).read_bytes(), mimetype=kind)


def _last(picking: Picking, response: Response) -> Response:
    """``response``, after which the server may stop."""
    response.call_on_close(picking.ended.set)
    return response


def _sent(name: str, kind: type) -> Any:
    """The field ``name`` of the JSON that was sent."""
    data = request.get_json()
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, kind):
        abort(400, f"Send JSON with {name!r}, a {kind.__name__}.")
    return value


def _chosen(picking: Picking) -> list[str]:
    """The chosen paths, which have to be modules of the model; in the model's order."""
    chosen = _sent("paths", list)
    unknown = [path for path in chosen if not isinstance(path, str) or path not in picking.paths]
    if unknown:
        abort(400, f"Unknown module {unknown[0]!r}.")
    wanted = set(chosen)
    return [path for path in picking.paths if path in wanted]


def node_data(node: Node) -> dict[str, Any]:
    """A node of the folded tree as the page reads it, with the paths of the real modules.

    >>> data = node_data(folded(torch.nn.Sequential(*(torch.nn.Linear(4, 8) for _ in range(3)))))
    >>> [(child["name"], child["paths"], child["size"], child["leaves"]) for child in data["children"]]
    [('0-2', ['0', '1', '2'], 120, 'weight 8×4, bias 8')]
    """
    leaves = [f"{leaf.name} {'×'.join(map(str, leaf.shape)) or '1'}" for leaf in node.leaves if leaf.kind != "buffer"]
    children = [node_data(child) for child in node.children]
    return {
        "name": node.name,
        "class": node.class_name,
        "paths": list(node.paths),
        "size": node.numel(),
        "leaves": ", ".join(leaves),
        "bare": not leaves and all(child["bare"] for child in children),
        "children": children,
    }
