"""The error tree: every failure Galerne names, with what its reader needs to act.

GalerneError
├── ConfigError                 a configuration file that cannot be served; file, line, what is allowed
├── SourceError                 a model source that cannot be prepared
├── EngineError                 an engine that does not start or has died
├── ClusterError                Ray, HAProxy or a port that is not as needed
│   └── KubernetesError         what a Kubernetes API server answered, or that it did not
│       ├── ApiUnreachable      no connection, or no answer in time
│       ├── ApiDenied           401, 403  carries what was asked for
│       ├── ApiMissing          404
│       ├── ApiConflict         409  somebody else wrote first
│       ├── ApiGone             410  the history of a watch or of a list in parts has passed
│       └── ApiBusy             429  carries `retry_after_s`
├── SimulationError             a trace, profile or option that cannot be simulated
└── RequestError                an answer to a client, in OpenAI's error shape
    ├── BadRequest              400  malformed or out of bounds
    ├── Unauthenticated         401  no key, or one that is not known
    ├── Forbidden               403  a key that may not do this
    ├── NotFound                404  no such route or model
    ├── MethodNotAllowed        405  carries the methods that the route takes
    ├── RequestTimeout          408  a body that does not arrive
    ├── PayloadTooLarge         413
    ├── UnsupportedEncoding     415  a body that is compressed
    ├── RateLimited             429  too many requests in a minute, at once or waiting; carries `retry_after_s`
    │   ├── TokensLimited       429  too many tokens in a minute
    │   └── QuotaExceeded       429  a day's or month's budget that is used up
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


class KubernetesError(ClusterError):
    """An answer of a Kubernetes API server that is no success; `status` 0: there was none."""

    def __init__(self, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(message, status, reason)
        self.message = message
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return self.message


class ApiUnreachable(KubernetesError):
    """The API server cannot be reached, or broke off."""


class ApiDenied(KubernetesError):
    """The API server knows who asks and refuses, or does not know: `verb` on `resource` of API group `group`."""

    def __init__(self, message: str, status: int, verb: str, group: str, resource: str, namespace: str | None) -> None:
        super().__init__(message, status, "Forbidden")
        # What Exception's own pickling hands to __init__.
        self.args = (message, status, verb, group, resource, namespace)
        self.verb = verb
        self.group = group
        self.resource = resource
        self.namespace = namespace


class ApiMissing(KubernetesError):
    """There is no such object, or no such kind."""


class ApiConflict(KubernetesError):
    """The object was changed since it was read, or exists already."""


class ApiGone(KubernetesError):
    """The resource version is too old: list again."""


class ApiBusy(KubernetesError):
    """Too many requests, or (evictions) a disruption budget that allows none now."""

    def __init__(self, message: str, status: int, retry_after_s: float | None, budget: bool = False) -> None:
        super().__init__(message, status, "TooManyRequests")
        self.args = (message, status, retry_after_s, budget)
        self.retry_after_s = retry_after_s
        self.budget = budget


class SimulationError(GalerneError):
    """A trace, a profile or an option that cannot be simulated; the message says which and what is allowed."""


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
    """`allow`: the methods that the route takes."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allow = allow

    def __reduce__(self) -> tuple[object, ...]:
        return (_not_allowed, (self.message, self.allow))


def _not_allowed(message: str, allow: tuple[str, ...]) -> MethodNotAllowed:
    return MethodNotAllowed(message, allow=allow)


class RequestTimeout(RequestError):
    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class PayloadTooLarge(RequestError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedEncoding(RequestError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"


class RateLimited(RequestError):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"


class TokensLimited(RateLimited):
    type = "tokens"


class QuotaExceeded(RateLimited):
    type = "insufficient_quota"
    code = "insufficient_quota"


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
