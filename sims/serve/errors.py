"""What a client is told when it does not get an answer, in the shape that OpenAI's clients read."""

from typing import Any

BAD_REQUEST, NOT_FOUND, TOO_LARGE, SERVER_ERROR, UNAVAILABLE = 400, 404, 413, 500, 503
_TYPES = {
    BAD_REQUEST: "invalid_request_error",
    NOT_FOUND: "not_found_error",
    TOO_LARGE: "invalid_request_error",
    UNAVAILABLE: "overloaded_error",
}


class ApiError(Exception):
    """A request that gets no answer; nothing has changed."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Note the HTTP status, what to say, the field at fault, and a word that programs read."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the body. Source: OpenAI's API reference, the object `error`."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < SERVER_ERROR else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_value(param: str, value: object, needs: str) -> ApiError:
    """Return the error for a field whose value cannot be."""
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return ApiError(BAD_REQUEST, f"{param} is {shown}: needs {needs}", param=param)


_SHOWN = 80
"""Characters of a wrong value that a message repeats."""
