"""Exception types of the ROS-free core, one per kind of failure."""

from __future__ import annotations

from dataclasses import dataclass

from .reasons import Reason


class CoreError(Exception):
    """Base of every error of flashrt_ros.core; `reason` is the code that goes into ~/status."""

    reason: Reason = Reason.OK


@dataclass(frozen=True)
class ContractProblem:
    """One thing wrong in a contract file; line counts from 1, 0 when the file as a whole is meant."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


class ContractError(CoreError, ValueError):
    """The robot contract is malformed or contradicts itself; one line `file:line: text` per problem."""

    reason = Reason.CONTRACT_INVALID

    def __init__(self, problems: list[ContractProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))


class ContractNotFoundError(ContractError, FileNotFoundError):
    """No contract of that name or path."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class PolicyMismatchError(ContractError):
    """The checkpoint and the contract disagree on views, widths, names or rate."""

    reason = Reason.POLICY_MISMATCH


class IngestError(CoreError, ValueError):
    """A message cannot become part of an observation: which stream, and why."""

    def __init__(self, reason: Reason, stream: str, message: str) -> None:
        self.reason = reason
        self.stream = stream
        self.message = message
        super().__init__(f"{stream}: {message}" if stream else message)


class DamagedImageError(IngestError):
    """A compressed image whose damage shows only when it is decoded."""


class ChunkError(CoreError, ValueError):
    """A chunk or command has the wrong shape or holds values that are not finite."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class StartError(CoreError, ValueError):
    """The measured joint positions are no safe start for commands."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class TimelineConfigError(CoreError, ValueError):
    """Periods, cap or blend of a timeline contradict each other."""

    reason = Reason.CONTRACT_INVALID


class WorkerStoppedError(CoreError, RuntimeError):
    """A command was given to an inference worker that has been stopped."""

    reason = Reason.WORKER_STOPPED


class BagError(CoreError, ValueError):
    """A bag cannot be used: damaged, without a topic the contract needs, or without a usable observation."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class TooFewObservationsError(CoreError, RuntimeError):
    """The live topics gave no usable observation for a while; `reason` says what stood in the way."""

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        super().__init__(message)
