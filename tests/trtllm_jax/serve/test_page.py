"""The page at /, as files: what anybody may read, what it may load, and that nothing else is there."""

import re
from typing import Any

import httpx2 as httpx
import pytest

from trtllm_jax import LLM
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings
from trtllm_jax.serve.system.page import FILES


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_files_need_no_key_and_may_load_nothing_from_elsewhere(tiny_llm: LLM, served: Any, path: str) -> None:
    with served(create_app(tiny_llm, ServeSettings(model_names=("tiny",), api_keys=("k",)))) as url:
        answer = httpx.get(f"{url}{path}")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/page/nothing.js").status_code == 401
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    kinds = {"/": "text/html", "css": "text/css", ".js": "text/javascript"}
    assert answer.headers["content-type"].startswith(kinds[path[-3:] if len(path) > 1 else path])
    addresses = set(re.findall(r"https?://[^\s\"']+", answer.text)) - {"http://www.w3.org/2000/svg"}
    assert not addresses
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)


def test_what_it_asks_for_is_there(http: httpx.Client) -> None:
    index = http.get("/").text
    named = set(re.findall(r'(?:href|src)="(page/[^"]+)"', index))
    named |= {
        f"page/{name}" for file in FILES for name in re.findall(r'from "\./([^"]+)"', http.get(f"/page/{file}").text)
    }
    assert named == {f"page/{name}" for name in FILES}
    ids = set(re.findall(r'id="([^"]+)"', index))
    assert set(re.findall(r'at\("([^"]+)"\)', http.get("/page/page.js").text)) <= ids


@pytest.mark.parametrize("name", ["index.html", "../app.py", "..%2Fapp.py", "page.js/", "%2e%2e/app.py"])
def test_nothing_else_is_there(http: httpx.Client, name: str) -> None:
    assert http.get(f"/page/{name}").status_code == 404
