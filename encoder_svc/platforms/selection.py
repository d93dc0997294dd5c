"""Who decides, as pure functions: an override is obeyed or refused, and all else follows the platform's rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from encoder_svc.errors import AttentionBackendError
from encoder_svc.platforms.backends import FLASH_ATTN, UPSTREAM_FLASH_ATTN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from encoder_svc.platforms.backends import BackendSpec, Implementation
    from encoder_svc.platforms.facts import Facts

SelectionSource = Literal["override", "platform", "promoted"]

OVERRIDE_FLAG: Final = "--mm-encoder-attn-backend"
PIN_FLAG: Final = "--mm-encoder-flash-attn-implementation"


@dataclass(frozen=True, slots=True)
class Rejection:
    """A backend that was passed over, and why: the end of a sentence that begins with its name."""

    backend: str
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which attention backend was chosen, by whom and why. Logged once and returned by GetModelInfo.

    Attributes:
        backend: such as ``"TORCH_SDPA"``.
        implementation: what carries the backend out, such as ``"fa4"`` or ``"torch"``.
        source: ``"override"`` if the operator named it, ``"platform"`` if the platform's rule did, ``"promoted"`` if
            upstream flash-attn took the place of what the rule chose.
        reason: one sentence.
        implementation_version: of the package that carries it out.
        windows: what takes the layers that attend within windows, where that is not ``backend``.
        rejected: every other backend of the platform; empty under an override, which passes nothing over.
    """

    backend: str
    implementation: str
    source: SelectionSource
    reason: str
    implementation_version: str = ""
    windows: str = ""
    rejected: tuple[Rejection, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A platform's automatic choice: the first of ``order`` that can run.

    Attributes:
        because: what in the facts the order follows from.
        settled: backends that an operator's own switch put first; no promotion takes their place.
    """

    order: tuple[str, ...]
    because: str
    settled: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of a platform.

    Attributes:
        supported: the platform's backends.
        head_size, dtype: None where they are not known yet.
        pinned: the operator's implementation of FLASH_ATTN.
        failed: (backend, implementation) to why, of those that failed the start-up check.
    """

    facts: Facts
    supported: tuple[str, ...]
    backends: Mapping[str, BackendSpec]
    head_size: int | None
    dtype: str | None
    pinned: str | None = None
    failed: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def implementations(self, name: str) -> tuple[Implementation, ...]:
        """Those of a backend that the operator leaves to choose from."""
        every = self.backends[name].implementations
        return tuple(i for i in every if name != FLASH_ATTN or self.pinned in (None, i.name))

    def why_not(self, name: str, implementation: Implementation) -> str | None:
        failure = self.failed.get((name, implementation.name))
        return failure or implementation.why_not(self.facts, self.head_size, self.dtype)

    def find(self, name: str) -> tuple[Implementation | None, str]:
        """The first implementation of a backend that can run, and why those before it cannot.

        Without one, the word is the last's: it is the one that takes the most.
        """
        passed: list[str] = []
        why = ""
        for implementation in self.implementations(name):
            reason = self.why_not(name, implementation)
            if reason is None:
                return implementation, "; ".join(passed)
            passed.append(f"{implementation.name} {reason}")
            if not why or any(fit.is_for_kind_of(self.facts) for fit in implementation.fits):
                why = reason
        return None, why

    def valid(self) -> tuple[str, ...]:
        """The backends that an override may name here."""
        return tuple(name for name in self.supported if self.find(name)[0] is not None)


def obey(question: Question, override: str) -> Selection:
    """The operator's choice as it is, or an error. Nothing is ever put in its place.

    Raises:
        AttentionBackendError: it cannot run here; says why, and what can.
    """
    name = override.strip().upper()
    if name not in question.backends:
        _refuse(question, f"{OVERRIDE_FLAG} {override}: not a backend of platform {question.facts.platform} or any")
    if name not in question.supported:
        elsewhere = " and ".join(question.backends[name].platforms)
        _refuse(
            question,
            f"{OVERRIDE_FLAG} {override}: not a backend of platform {question.facts.platform}; it runs on {elsewhere}",
        )
    for (backend, which), failure in question.failed.items():
        if backend == name:
            raise AttentionBackendError(f"{OVERRIDE_FLAG} {override}: {name} ({which}) {failure}.")
    implementation, why = question.find(name)
    if implementation is None:
        pin = f" with {PIN_FLAG} {question.pinned}" if name == FLASH_ATTN and question.pinned else ""
        _refuse(question, f"{OVERRIDE_FLAG} {override}{pin}: {name} {why}")
    return Selection(
        backend=name,
        implementation=implementation.name,
        implementation_version=question.facts.version(implementation.package) or "",
        source="override",
        reason=_sentence(question, name, f"{name} was asked for with {OVERRIDE_FLAG}", why),
    )


def choose(question: Question, rule: Rule) -> Selection:
    """The platform's choice: its rule, then promotion to upstream flash-attn.

    Raises:
        AttentionBackendError: nothing in the rule can run, or FLASH_ATTN could but not as it is pinned.
    """
    facts = question.facts
    name, implementation, passed, rejected = _first(question, rule)
    source: SelectionSource = "platform"
    reason = f"{name} is the choice on {facts.platform}, {rule.because}"
    promotion = _promotion(question, rule, name, rejected)
    if promotion is not None:
        rejected[name] = f"is what the rule chose; upstream flash-attn ({promotion.name}) took its place"
        source, reason = (
            "promoted",
            f"upstream flash-attn takes the place of {name} on {facts.platform}, {rule.because}",
        )
        name, implementation = FLASH_ATTN, promotion
    return Selection(
        backend=name,
        implementation=implementation.name,
        implementation_version=facts.version(implementation.package) or "",
        source=source,
        reason=_sentence(question, name, reason, passed),
        rejected=_passed_over(question, rule, name, rejected),
    )


def _first(question: Question, rule: Rule) -> tuple[str, Implementation, str, dict[str, str]]:
    """The first backend of the rule that can run, its implementation, and what was passed over before it."""
    rejected: dict[str, str] = {}
    for name in rule.order:
        implementation, why = question.find(name)
        if implementation is not None:
            return name, implementation, why, rejected
        _check_pin(question, name, why)
        rejected[name] = why
    passed = "; ".join(f"{name} {why}" for name, why in rejected.items())
    raise AttentionBackendError(f"no attention backend can run on {question.facts.platform}, {rule.because}: {passed}.")


def _promotion(question: Question, rule: Rule, chosen: str, rejected: Mapping[str, str]) -> Implementation | None:
    """Upstream flash-attn, where the rule chose something else and flash-attn takes the same."""
    if chosen in (FLASH_ATTN, *rule.settled) or FLASH_ATTN not in question.supported or FLASH_ATTN in rejected:
        return None
    implementation, why = question.find(FLASH_ATTN)
    if implementation is None:
        _check_pin(question, FLASH_ATTN, why)
        return None
    return implementation if implementation.name in UPSTREAM_FLASH_ATTN else None


def _check_pin(question: Question, name: str, why: str) -> None:
    """Where FLASH_ATTN would be taken, a pinned implementation that cannot run is refused, not passed over."""
    if name != FLASH_ATTN or question.pinned is None:
        return
    others = [
        implementation.name
        for implementation in question.backends[FLASH_ATTN].implementations
        if implementation.name != question.pinned and question.why_not(FLASH_ATTN, implementation) is None
    ]
    failed = (FLASH_ATTN, question.pinned) in question.failed
    if others or failed:
        raise AttentionBackendError(
            f"{PIN_FLAG} {question.pinned}: {question.pinned} {why}. Valid here: {', '.join(others) or 'none'}."
        )


def _passed_over(question: Question, rule: Rule, chosen: str, rejected: Mapping[str, str]) -> tuple[Rejection, ...]:
    reasons = dict(rejected)
    for name in question.supported:
        if name == chosen or name in reasons:
            continue
        implementation, why = question.find(name)
        if implementation is None:
            reasons[name] = why
        elif question.backends[name].override_only:
            reasons[name] = f"runs only where {OVERRIDE_FLAG} names it"
        elif name in rule.order:
            reasons[name] = f"comes after {chosen}"
        else:
            reasons[name] = f"could run, but is no automatic choice on {question.facts.platform}, {rule.because}"
    return tuple(Rejection(name, why) for name, why in reasons.items() if name != chosen)


def _sentence(question: Question, chosen: str, reason: str, passed: str) -> str:
    """The reason, the implementations that were passed over, and whether a pin came to nothing."""
    idle = f"; {PIN_FLAG} {question.pinned} has no effect on it" if question.pinned and chosen != FLASH_ATTN else ""
    return f"{reason}{f' ({passed})' if passed else ''}{idle}."


def _refuse(question: Question, text: str) -> NoReturn:
    asked = ", ".join(
        part
        for part in (question.dtype, f"head size {question.head_size}" if question.head_size is not None else None)
        if part
    )
    valid = ", ".join(question.valid())
    raise AttentionBackendError(f"{text}. Valid here{f' ({asked})' if asked else ''}: {valid}.")
