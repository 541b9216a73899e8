"""GET / and /page/...: a page to try the model with. Its files hold no secret, and ask no other host for anything."""

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.serve.http.errors import ApiError
from trtllm_jax.serve.server import Server

_KINDS = {"css": "text/css", "js": "text/javascript"}
FILES = ("page.css", "page.js", "server.js", "figures.js")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def index(server: Server, request: Request) -> Response:
    """The page."""
    return Response(_read("index.html"), headers=_HEADERS, media_type="text/html; charset=utf-8")


async def part(server: Server, request: Request) -> Response:
    """A file that belongs to it."""
    name = request.path_params["name"]
    if name not in FILES:
        raise ApiError(404, f"there is no {name[:80]!r} here: the page has {', '.join(FILES)}")
    kind = _KINDS[name.rpartition(".")[2]]
    return Response(_read(name), headers=_HEADERS, media_type=f"{kind}; charset=utf-8")


@cache
def _read(name: str) -> bytes:
    return files("trtllm_jax.serve.system").joinpath("page_files", name).read_bytes()
