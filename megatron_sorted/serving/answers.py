"""Errors of requests, and their responses in OpenAI's format."""

import json

from fastapi.responses import JSONResponse

from megatron_sorted.errors import MemoryExhaustedError, SortedError

RETRY_SECONDS = 5


class RefusedError(SortedError):
    """A request cannot be answered: the message, the field at fault and the HTTP status."""

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status


class BusyError(SortedError):
    """The server accepts no requests: its queue is full, or it is stopping. Retry later."""

    def __init__(self, message: str, retry_seconds: int = RETRY_SECONDS):
        super().__init__(message)
        self.retry_seconds = retry_seconds


class AsciiResponse(JSONResponse):
    """A JSON response in ASCII, which can hold any text, also halves of UTF-16 pairs."""

    def render(self, content: object) -> bytes:
        """Return the response's body."""
        return json.dumps(content).encode("ascii")


def error_response(
    message: str, field: str | None = None, status: int = 400, retry_seconds: int = RETRY_SECONDS
) -> JSONResponse:
    """Build an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": str(retry_seconds)}}.get(
        status
    )
    code = "invalid_api_key" if status == 401 else None
    return AsciiResponse(
        {"error": {"message": message, "type": kind, "param": field, "code": code}}, status, headers
    )


def response_to_error(error: Exception, field: str | None) -> JSONResponse:
    """Build the response for an error; ``field`` is what our errors without a field are about."""
    if isinstance(error, RefusedError):
        return error_response(str(error), error.field, error.status)
    if isinstance(error, BusyError):
        return error_response(str(error), None, 503, error.retry_seconds)
    if isinstance(error, MemoryExhaustedError):
        return error_response(str(error), None, 503)
    if isinstance(error, SortedError):
        return error_response(str(error), field)
    return error_response(
        f"the server failed ({type(error).__name__}); other requests are still served.", None, 500
    )
