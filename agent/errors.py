"""What can go wrong around an agent, by what the agent does about it.

* AgentError
  - Unreachable        no control plane answered; try again later, keep serving meanwhile
    + Busy             it answered that it cannot now (429, 5xx), perhaps with a time to come back
  - Refused            it answered, and the same request will not do better
    + NotAdmitted      the registration waits for approval
    + NotRecognised    it does not know this node (any more)
      . Retired        it says that it let this node out, for good; serve no more
  - Untrusted          whoever answered is not the control plane that the token names
  - DirectoryInUse     another agent has the state directory
  - StorageFailed      the state directory cannot be written, for instance because the disk is full
  - ProxyFailed        Envoy cannot be started or does not answer
  - Misconfigured      the settings cannot work; the message says which one
"""


class AgentError(Exception):
    """The message is meant for the operator of the site."""

    retry_after_s = 0.0
    """What the other side asks to be left alone for, at least."""


class Unreachable(AgentError):
    pass


class Busy(Unreachable):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Refused(AgentError):
    def __init__(self, message: str, status: int, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.reasons = reasons
        """Fields of the error's details: for 401, why the proof was refused."""


class NotAdmitted(Refused):
    pass


class NotRecognised(Refused):
    pass


class Retired(NotRecognised):
    pass


class Untrusted(AgentError):
    pass


class DirectoryInUse(AgentError):
    pass


class StorageFailed(AgentError):
    pass


class ProxyFailed(AgentError):
    pass


class Misconfigured(AgentError):
    pass
