"""Typed errors: each has a stable code, names its subject and says what to change.

The code is part of the interface (JSON output, Ansible results); the wording is not.
"""

from __future__ import annotations

from typing import Any


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


class CellblockError(Exception):
    """Base of all expected failures.

    ``subject`` is the field, file or host the error is about, ``message`` what is wrong with it,
    ``remedy`` what to do. ``str()`` of the error is one sentence with all three.
    """

    code = "error"

    def __init__(self, subject: str, message: str, remedy: str) -> None:
        # Whoever wrote what is wrong has chosen how long it is.
        self.subject = _cut(subject, 500)
        self.message = _cut(message, 4000)
        self.remedy = _cut(remedy, 1000)
        super().__init__(f"{self.subject}: {self.message}; {self.remedy}")

    def __reduce__(self) -> tuple[type[CellblockError], tuple[str, str, str]]:
        """Errors travel between processes; an exception goes by its one argument otherwise."""
        return type(self), (self.subject, self.message, self.remedy)

    def as_dict(self) -> dict[str, str]:
        """The error as it travels in JSON: code, subject, message, remedy, text."""
        return {
            "code": self.code,
            "subject": self.subject,
            "message": self.message,
            "remedy": self.remedy,
            "text": str(self),
        }


class Cancelled(Exception):
    """The client asked for the job's end, or went away."""


class InvalidJobError(CellblockError):
    """The job, as written, cannot be run on any host; ``subject`` is the field."""

    code = "invalid_job"


class JobFileError(CellblockError):
    """A job file, or a file that it names, cannot be read; ``subject`` is the path."""

    code = "job_file"


class UnknownEnvironmentError(CellblockError):
    """The host has no such environment."""

    code = "unknown_environment"


class LimitAboveMaximumError(CellblockError):
    """The job asks for more than this host gives."""

    code = "limit_above_maximum"


class UnsupportedNetworkError(CellblockError):
    """The job asks for a network policy that this host cannot enforce."""

    code = "unsupported_network"


class ForbiddenDestinationError(CellblockError):
    """The job asks for the network of something that no job may reach."""

    code = "forbidden_destination"


class UnresolvedNameError(CellblockError):
    """The job's allow list has a host name that does not resolve."""

    code = "unresolved_name"


class UnsupportedTargetError(CellblockError):
    """The job is to run where this host cannot run it."""

    code = "unsupported_target"


class UnknownMountError(CellblockError):
    """The job asks for a mount that this host does not offer, or not writable."""

    code = "unknown_mount"


class HostSetupError(CellblockError):
    """This host cannot enforce what it must; no job is started (never silently weaker)."""

    code = "host_setup"


class ServiceUnavailableError(CellblockError):
    """The supervisor's socket does not answer, or refuses the caller."""

    code = "service_unavailable"


class HostOverloadedError(CellblockError):
    """A resource of the host's kernel was used up before anything was started; it may go by itself."""

    code = "host_overloaded"


class WorkerLostError(CellblockError):
    """The worker container ended, or is not to be trusted, before anything of the stage was started."""

    code = "worker_lost"


class InternalError(CellblockError):
    """The sandbox failed; not caused by the job."""

    code = "internal_error"


BAD_INPUT: tuple[type[CellblockError], ...] = (
    InvalidJobError,
    JobFileError,
    UnknownEnvironmentError,
    LimitAboveMaximumError,
    UnsupportedNetworkError,
    ForbiddenDestinationError,
    UnresolvedNameError,
    UnsupportedTargetError,
    UnknownMountError,
)
"""What the caller can mend in the job; the other errors are the host's."""

_ALL: tuple[type[CellblockError], ...] = (
    *BAD_INPUT,
    HostSetupError,
    ServiceUnavailableError,
    HostOverloadedError,
    WorkerLostError,
    InternalError,
)
_BY_CODE = {cls.code: cls for cls in _ALL}


def from_dict(data: dict[str, Any]) -> CellblockError:
    """The inverse of :meth:`CellblockError.as_dict`, for clients of the service."""
    cls = _BY_CODE.get(str(data.get("code")), InternalError)
    return cls(
        str(data.get("subject", "service")),
        str(data.get("message", "unknown failure")),
        str(data.get("remedy", "see the journal of cellblock.service")),
    )
