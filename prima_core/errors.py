"""Every error that a user may see: what happened, whose fault it is, and what to do next.

Raise the most exact class; `hint` is the next action, ready to print. Errors cross process borders
as `(kind, message, hint)`, never as pickled objects.
"""

from __future__ import annotations


class PrimaError(Exception):
    """An error with a message (what happened, with the value) and a hint (what to do next)."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ModelError(PrimaError):
    """The model file is damaged or of a kind that is not supported; `field` names the culprit."""

    def __init__(self, message: str, *, field: str = "", hint: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message, hint=hint)
        self.field = field


class LibraryError(PrimaError):
    """No model is meant by a name, or several are; or a model could not be fetched from where it is."""


class ConfigError(PrimaError):
    """A flag, environment variable or file of the user's is wrong."""


class PluginError(PrimaError):
    """A plugin that was asked for by name is missing, broken or not usable here."""


class PlanError(PrimaError):
    """No plan fits, or a plan breaks a rule that every plan must keep."""


class FrameError(PrimaError):
    """Bytes from another process are not a frame of this protocol, or break its limits."""


class LinkError(PrimaError):
    """Base of the three errors that a link may raise."""


class LinkTimeout(LinkError):
    """Nothing could be sent or was received within the timeout; the link is still usable."""


class LinkClosed(LinkError):
    """This side has closed the link."""


class LinkBroken(LinkError):
    """The link cannot be used any more: the address is taken, the peer refused, the library failed."""


class AuthError(PrimaError):
    """The other side does not know the cluster's token."""


class ClusterError(PrimaError):
    """The cluster cannot serve now: a node was lost, or not enough nodes are there."""


class Busy(ClusterError):
    """More requests are waiting than may wait."""


class DeviceMemoryError(PrimaError):
    """A device, `device` by its id where it is known, has not enough memory for what it was asked to hold."""

    def __init__(self, message: str, *, device: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.device = device


class TemplateError(PrimaError):
    """A chat template failed, asked for too much, or took too long."""


class RequestError(PrimaError):
    """A request asks for something that cannot be done; `param` names the culprit."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param = param
        self.code = code
