"""`ServerOptions`: the options of a server besides those of its engine."""

import ssl
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from trtllm_jax.common.strict_model import NonNegativeInt, StrictModel
from trtllm_jax.serve.settings import Seconds, ServeSettings
from trtllm_jax.serve.tracing import check_available

Name = Annotated[str, Field(min_length=1)]


class ServerOptions(StrictModel, owner="trtllm-serve"):
    """The options of `trtllm-serve` that are not the engine's, with their defaults.

    Attributes:
        host: the address to listen on.
        port: the port, 0 for any that is free.
        served_model_name: the model's names in requests; answers use the first.
        num_serve_frontends: the number of processes for HTTP and text.
        num_postprocess_workers: added to the number of frontends, because each does all of its requests' work.
        max_queue_size: the number of sequences that may wait, over all processes.
        request_timeout: seconds for one answer.
        drain_timeout: seconds for the last answers after SIGTERM.
        api_key: the keys of which clients must send one; () requires none.
    """

    host: Name = "localhost"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    served_model_name: tuple[Name, ...] = Field(min_length=1)
    num_serve_frontends: Annotated[int, Field(ge=1, le=64)] = 1
    num_postprocess_workers: Annotated[int, Field(ge=0, le=64)] = 0
    max_queue_size: NonNegativeInt = 1024
    request_timeout: Seconds = 3600.0
    drain_timeout: Seconds = 30.0
    api_key: tuple[Name, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    reasoning_parser: str | None = None
    tool_parser: str | None = None
    otlp_traces_endpoint: str | None = None

    @classmethod
    def _prepare(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take a string or a list of a YAML file where the command line has an option that may be repeated."""
        repeated = {
            name: (value,) if isinstance(value, str) else tuple(value)
            for name in ("served_model_name", "api_key")
            if isinstance(value := arguments.get(name), str | list)
        }
        return {**arguments, **repeated}

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            missing = "ssl_certfile" if self.ssl_keyfile else "ssl_keyfile"
            raise ValueError(f"TLS needs a key and its certificate: trtllm-serve.{missing} is missing")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise ValueError("trtllm-serve.ssl_ca_certs is for TLS: give ssl_keyfile and ssl_certfile, too")
        if self.ssl_certfile:
            self._check_files(self.ssl_certfile)
        return self

    def _check_files(self, certificate: str) -> None:
        """Raise what a frontend would fail with after the model is loaded."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without a password for an encrypted key, OpenSSL would ask for one on the terminal.
            context.load_cert_chain(certificate, self.ssl_keyfile, password="")
        except OSError as error:
            raise ValueError(
                f"trtllm-serve.ssl_certfile = {certificate!r} and ssl_keyfile = {self.ssl_keyfile!r} cannot be used "
                f"({error}): give a certificate and its key, not encrypted, as PEM files"
            ) from error
        try:
            if self.ssl_ca_certs:
                context.load_verify_locations(self.ssl_ca_certs)
        except OSError as error:
            raise ValueError(
                f"trtllm-serve.ssl_ca_certs = {self.ssl_ca_certs!r} cannot be used ({error}): give a PEM file of the "
                "authorities whose clients may come in"
            ) from error

    @model_validator(mode="after")
    def _check_collector(self) -> Self:
        if self.otlp_traces_endpoint is not None:
            check_available(self.otlp_traces_endpoint)
        return self

    @property
    def processes(self) -> int:
        """The number of frontends."""
        return self.num_serve_frontends + self.num_postprocess_workers

    @property
    def settings(self) -> ServeSettings:
        """The application's settings."""
        return ServeSettings(
            model_names=self.served_model_name,
            api_keys=self.api_key,
            request_timeout=self.request_timeout,
            reasoning_parser=self.reasoning_parser,
            tool_parser=self.tool_parser,
            otlp_traces_endpoint=self.otlp_traces_endpoint,
            # A response that one process stored is unknown to the others.
            stored_responses=ServeSettings.model_fields["stored_responses"].default if self.processes == 1 else 0,
        )
