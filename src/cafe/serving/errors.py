"""What a request that cannot be answered is told: OpenAI's error object, never the text of an exception."""

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cafe.errors import CafeError, RecordError
from cafe.serving.encoding import ContextLengthError
from cafe.serving.jobs import DeadlineError, EngineError, NotReadyError, OverloadedError
from cafe.utils.text import escape_controls, shorten

logger = logging.getLogger(__name__)

MAX_NAME = 80  # characters of a field's name that are repeated in a message

# OpenAI's types of errors, by status; those that are not listed are the request's own fault, or the server's from 500.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Texts of the framework, and ours in their place.
_PARSE_ERROR = "There was an error parsing the body"
_HTTP_MESSAGES = {
    "Not Found": "There is nothing at this address.",
    "Method Not Allowed": "This address does not take requests of this method.",
    _PARSE_ERROR: "The body is no valid JSON.",
}


class ApiError(Exception):
    """Report what is wrong with a request.

    Attributes:
        status: of the answer.
        code: what programs recognize the error by.
        message: what people read.
        param: the field that is wrong.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def describe_error(error: Exception, request_id: str) -> ApiError:
    """Return what a client learns of an error. What it does not learn is logged."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, "context_length_exceeded", str(error))  # numbers alone
        # The texts of these quote libraries, files and the model's template.
        case RecordError():
            return ApiError(400, "image_decode_failed", "An image or a text of the request cannot be read.")
        case CafeError():
            logger.warning("Request %s was refused: %s", request_id, escape_controls(str(error)))
            return ApiError(400, "invalid_request", "The request cannot be answered by this model or collection.")
        case OverloadedError():
            seconds = max(1, math.ceil(error.retry_after))
            message = "The server is busy: try again later."
            return ApiError(429, "overloaded", message, headers={"Retry-After": str(seconds)})
        case NotReadyError():
            return ApiError(503, "not_ready", "The server is starting or stopping.", headers={"Retry-After": "1"})
        case DeadlineError():
            return ApiError(504, "deadline_exceeded", "The request was not done in time.")
    logger.error("Request %s failed.", request_id, exc_info=error)
    return ApiError(500, "internal_error", f"The server failed; its log says why, at request {request_id}.")


def describe_validation(errors: Sequence[Any]) -> ApiError:
    """Return what a client learns of a body that does not fit the schema.

    Args:
        errors: of pydantic, of which there is one for each kind of value that a field may have.
    """
    # The kind of value that was meant is the one that was right up to the deepest place.
    error = max(errors, key=lambda each: len(each["loc"]))
    param = _field_name(error["loc"])
    if error["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "The body is no valid JSON.")
    if error["type"] == "extra_forbidden":
        return ApiError(400, "unknown_field", f"There is no field {param}.", param)
    if error["type"] == "missing":
        return ApiError(422, "missing_field", f"{param or 'The body'} is missing.", param)
    # These texts are pydantic's own and name types and ranges, never values.
    reason = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return ApiError(422, "invalid_value", f"{param or 'The body'}: {reason}.", param)


def _field_name(loc: Sequence[str | int]) -> str | None:
    """Return the name of a field, such as messages.0.content, without the kinds of values that pydantic tried."""
    parts = [str(part) for part in loc if isinstance(part, int) or _is_field(part)]
    return escape_controls(shorten(".".join(parts), MAX_NAME)) or None


def _is_field(part: str) -> bool:
    """Tell a field from a type, which pydantic calls str, Item, or list[Item]."""
    return part not in ("body", "str", "int") and "[" not in part and not part[:1].isupper()


def request_id_of(request: Request) -> str:
    """Return the id of a request."""
    return str(request.scope.get("cafe.request_id", ""))


def install_error_handlers(app: FastAPI) -> None:
    """Have an app answer every error with OpenAI's error object."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        """Answer an error of ours."""
        return describe_error(error, request_id_of(request)).response()

    async def answer_validation(request: Request, error: Exception) -> JSONResponse:
        """Answer a body that does not fit the schema."""
        assert isinstance(error, RequestValidationError)
        return describe_validation(error.errors()).response()

    async def answer_http(request: Request, error: Exception) -> JSONResponse:
        """Answer an error of the framework, such as an unknown address, or a route's own sentence."""
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        message = _HTTP_MESSAGES.get(error.detail, error.detail)
        code = "invalid_json" if error.detail == _PARSE_ERROR else phrase.lower().replace(" ", "_")
        return ApiError(error.status_code, code, message, headers=error.headers).response()

    for kind in (ApiError, CafeError, OverloadedError, NotReadyError, DeadlineError, EngineError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_http)
