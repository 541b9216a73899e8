"""GET / and /page/...: a page to try the model with. Its files hold no secret, and ask no other host for anything."""

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from trtllm_jax.serve.http.endpoint import Endpoint
from trtllm_jax.serve.server import Server

FILES = ("page.css", "page.js", "server.js", "figures.js")
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _file_endpoint(path: str, name: str) -> Endpoint:
    media_type = f"{_MEDIA_TYPES[name.rpartition('.')[2]]}; charset=utf-8"

    async def page_file(server: Server, request: Request) -> Response:
        return Response(_read(name), headers=_HEADERS, media_type=media_type)

    return Endpoint("GET", path, page_file, public=True, documented=False)


@cache
def _read(name: str) -> bytes:
    return files("trtllm_jax.serve.system").joinpath("page_files", name).read_bytes()


ENDPOINTS = (_file_endpoint("/", "index.html"), *(_file_endpoint(f"/page/{name}", name) for name in FILES))
