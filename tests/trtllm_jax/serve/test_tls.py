"""TLS with an authority made for the test: `trtllm-serve` with and without client certificates, and unfit files."""

import json
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
import trustme
from openai import OpenAI

from tests.trtllm_jax.tiny_engine import CACHE, SIZES
from trtllm_jax.serve.config import ServerOptions

SECONDS = 240
SERVE = "from trtllm_jax.commands.serve import main; main()"


class Files:
    """A server's key and certificate, and a client's, from one authority."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority = folder / "authority.pem"
        authority.cert_pem.write_to_path(self.authority)
        self.server, self.client = (folder / f"{name}.pem" for name in ("server", "client"))
        authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(self.server)
        authority.issue_cert("someone@example.org").private_key_and_cert_chain_pem.write_to_path(self.client)

    def trusting(self, client: Path | None = None) -> ssl.SSLContext:
        """What a client of the server uses."""
        context = ssl.create_default_context(cafile=self.authority)
        if client:
            context.load_cert_chain(client)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["server", "both"])
def served(
    request: pytest.FixtureRequest, files: Files, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, bool]]:
    """Its address, and whether it asks clients for a certificate."""
    log = tmp_path_factory.mktemp("serve") / "log"
    config = log.with_name("config.yaml")
    config.write_text(json.dumps(SIZES | {"kv_cache_config": CACHE}))
    options = [
        "--host=127.0.0.1", "--port=0", f"--config={config}",
        f"--ssl_keyfile={files.server}", f"--ssl_certfile={files.server}",
        *([f"--ssl_ca_certs={files.authority}"] if request.param else []),
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(tiny_llama), *options], stderr=output)
    try:
        deadline = time.monotonic() + SECONDS
        while not (found := re.search(r"is served at (https://\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield found[1], request.param
    finally:
        process.terminate()
        assert process.wait(SECONDS) == 0


def test_who_is_trusted_is_answered(served: tuple[str, bool], files: Files) -> None:
    address, asks = served
    context = files.trusting(files.client if asks else None)
    with (
        httpx.Client(verify=context) as http,
        OpenAI(base_url=f"{address}/v1", api_key="x", http_client=http) as client,
    ):
        model = client.models.list().data[0].id
        stream = client.completions.create(model=model, prompt="a", max_tokens=4, stream=True)
        assert sum(len(part.choices) for part in stream) >= 1


def test_who_is_not_is_not(served: tuple[str, bool], files: Files, tmp_path: Path) -> None:
    address, asks = served
    without = [files.trusting(), files.trusting(Files(tmp_path).client)]
    for context in without if asks else [ssl.create_default_context()]:
        with httpx.Client(verify=context) as http, pytest.raises(httpx.TransportError):
            http.get(f"{address}/health")
    with httpx.Client() as http, pytest.raises(httpx.TransportError):
        http.get(f"{address.replace('https', 'http')}/health")


def options(**given: object) -> ServerOptions:
    return ServerOptions(served_model_name=("m",), **{name: str(value) for name, value in given.items()})


def test_files_that_do_not_fit_are_errors_before_anything_is_loaded(files: Files, tmp_path: Path) -> None:
    other, text = Files(tmp_path), tmp_path / "text.pem"
    text.write_text("no certificate")
    certificate = tmp_path / "certificate.pem"
    certificate.write_text(
        re.sub("-+BEGIN (?:RSA |EC )?PRIVATE.*?PRIVATE KEY-+", "", files.server.read_text(), flags=re.S)
    )
    assert options(ssl_keyfile=files.server, ssl_certfile=certificate)
    for key, chain in [
        (tmp_path / "none", certificate),
        (text, certificate),
        (other.server, certificate),
        (files.server, text),
    ]:
        with pytest.raises(ValueError, match=r"ssl_certfile = .* cannot be used"):
            options(ssl_keyfile=key, ssl_certfile=chain)
    with pytest.raises(ValueError, match=r"ssl_ca_certs = .* cannot be used"):
        options(ssl_keyfile=files.server, ssl_certfile=files.server, ssl_ca_certs=text)
    with pytest.raises(ValueError, match="ssl_ca_certs is for TLS"):
        options(ssl_ca_certs=files.authority)


def test_an_encrypted_key_asks_nobody(files: Files, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.server.read_bytes(), None)
    encrypted = tmp_path / "key.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="not encrypted"):
        options(ssl_keyfile=encrypted, ssl_certfile=files.server)
