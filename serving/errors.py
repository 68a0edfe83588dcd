"""The error tree: every failure Galerne names, with what its reader needs to act.

GalerneError
├── ConfigError                 a configuration file that cannot be served; file, line, what is allowed
├── SourceError                 a model source that cannot be prepared
├── EngineError                 an engine that does not start or has died
├── ClusterError                Ray, HAProxy or a port that is not as needed
└── RequestError                an answer to a client, in OpenAI's error shape
    ├── BadRequest              400  malformed or out of bounds
    ├── Unauthenticated         401  no key, or one that is not known
    ├── Forbidden               403  a key that may not do this
    ├── NotFound                404  no such route or model
    ├── MethodNotAllowed        405
    ├── RequestTimeout          408  a body that does not arrive
    ├── PayloadTooLarge         413
    ├── HeadersTooLarge         431
    ├── UpstreamFailed          502  an engine that broke off before its first byte
    ├── Unavailable             503  no replica yet; carries `retry_after_s`
    └── UpstreamTimeout         504  an engine that does not answer in time
"""

from __future__ import annotations


class GalerneError(Exception):
    """Root of the tree; its message is fit to show to whoever called."""


class ConfigError(GalerneError):
    """A configuration that cannot be used.

    `problems` holds one line per problem, each with file, line and what is allowed.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class SourceError(GalerneError):
    """A model source that cannot be prepared; the message says what to do."""


class EngineError(GalerneError):
    """An engine that does not start, or whose core has died."""


class ClusterError(GalerneError):
    """Ray, HAProxy or a port that is not as needed; the message says what to do."""


class RequestError(GalerneError):
    """An answer to a client; `type`, `code` and `param` follow OpenAI's error object."""

    status = 500
    type = "api_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments do not survive Exception's own pickling.
        return (_rebuild, (type(self), self.message, self.code, self.param, self.retry_after_s))


def _rebuild(
    kind: type[RequestError], message: str, code: str | None, param: str | None, retry_after_s: int | None
) -> RequestError:
    return kind(message, code=code, param=param, retry_after_s=retry_after_s)


class BadRequest(RequestError):
    status = 400
    type = "invalid_request_error"


class Unauthenticated(RequestError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class Forbidden(RequestError):
    status = 403
    type = "invalid_request_error"
    code = "permission_denied"


class NotFound(RequestError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(RequestError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class PayloadTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class HeadersTooLarge(RequestError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class UpstreamFailed(RequestError):
    status = 502
    code = "engine_failed"


class Unavailable(RequestError):
    status = 503
    type = "service_unavailable"
    code = "model_not_ready"


class UpstreamTimeout(RequestError):
    status = 504
    code = "engine_timeout"
