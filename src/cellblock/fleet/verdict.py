"""What the outcomes of the probes mean: each cell's verdict.

- ``as_declared``: reached and a flow allows it, or not reached and none does
- ``leak``: reached, or arrived without an answer, and no flow allows it
- ``broken``: not reached, and a flow allows it
- ``unproven``: not tried, not triable, or not reached without a proof that it could have been

That proof (the control) is an answer from the same address, protocol and port to somebody else in
the same run: to another vantage or, failing that, to the target host itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from .model import Fleet
from .probe_plan import CONTROL, JOB, SERVICE, SIBLING, Cell, Plan, Probe, sandboxes

AS_DECLARED, LEAK, BROKEN, UNPROVEN = "as_declared", "leak", "broken", "unproven"
VERDICTS = (AS_DECLARED, LEAK, BROKEN, UNPROVEN)

_ANSWERED = ("open", "refused")
_SILENT = ("filtered", "unreachable")
# A job may open no raw socket; that root in a slot gets no further is seen there.
_SILENT_IN_JOBS = (*_SILENT, "denied")

Observations = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Seen:
    """What became of one probe."""

    probe: Probe
    outcome: str  # of network_probe, or "missing"
    evidence: str
    # It came in at the target, although nothing came back.
    arrived: str | None = None

    @property
    def is_answered(self) -> bool:
        return self.outcome in _ANSWERED


@dataclass(frozen=True)
class Finding:
    """A cell with its verdict, how it is known, and one sentence that says it."""

    cell: Cell
    verdict: str
    is_reached: bool
    seen: tuple[Seen, ...]
    control: str | None
    sentence: str


@dataclass(frozen=True)
class Report:
    """The outcome of a run."""

    plan: Plan
    findings: tuple[Finding, ...]
    controls: tuple[Finding, ...]
    drift: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        counted = Counter(finding.verdict for finding in self.findings)
        counts = {verdict: counted.get(verdict, 0) for verdict in VERDICTS}
        counts[UNPROVEN] += len(self.plan.gaps)
        return counts

    @property
    def is_green(self) -> bool:
        """Everything as declared, and everything tried; an empty run proves nothing."""
        counts = self.counts
        bad = counts[LEAK] + counts[BROKEN] + counts[UNPROVEN]
        return counts[AS_DECLARED] > 0 and bad == 0 and not any(self.drift.values())

    def differences(self) -> list[str]:
        """All that is not as declared, worst first, as sentences."""
        sentences = [
            finding.sentence
            for verdict in (LEAK, BROKEN)
            for finding in self.findings
            if finding.verdict == verdict
        ]
        sentences += [f"{host}: {text}" for host, texts in self.drift.items() for text in texts]
        sentences += self.plan.gaps
        sentences += [f.sentence for f in self.findings if f.verdict == UNPROVEN]
        return sentences


def judge(
    plan: Plan,
    observations: Observations,
    drift: Mapping[str, Sequence[str]] | None = None,
) -> Report:
    """Compares what was seen with what is declared.

    ``plan``: the plan as ``complete`` left it. ``observations``: by host (and ``controller``) a
    mapping with what network_probe returned as ``listening``, ``probed`` and ``collected``, and
    ``problem``, one phrase, where the host could not be asked (``answers.observe``). ``drift``: by
    host, sentences about rules in force that are not the declared ones.
    """
    evidence = _Evidence(plan, observations)
    findings, controls = [], []
    for cell in plan.cells:
        seen = tuple(evidence.of(cell, probe) for probe in cell.probes)
        if cell.kind == CONTROL:
            controls.append(_control_finding(cell, seen))
        elif cell.kind == SERVICE:
            findings.append(_judge_service(cell, seen, evidence))
        else:
            findings.append(_judge_forged(cell, seen, evidence))
    differing = {host: tuple(texts) for host, texts in sorted((drift or {}).items()) if texts}
    return Report(plan, tuple(findings), tuple(controls), differing)


def _of_sandboxes(fleet: Fleet, observations: Observations) -> dict[str, dict[str, Any]]:
    """What slaves said about their sandboxes, as if these were hosts."""
    found: dict[str, dict[str, Any]] = {}
    for sandbox in sandboxes(fleet).values():
        seen = observations.get(sandbox.slave) or {}
        own: dict[str, Any] = {}
        if seen.get("problem"):
            own["problem"] = f"{sandbox.slave}: {seen['problem']}"
        probed = ((seen.get("probed") or {}).get("sandboxes") or {}).get(sandbox.what) or {}
        if probed.get("problem"):
            own["problem"] = probed["problem"]
        elif probed:
            own["probed"] = probed
        if sandbox.kind == SIBLING:
            own["listening"] = (seen.get("listening") or {}).get("job_network")
            own["collected"] = ((seen.get("collected") or {}).get("sandboxes") or {}).get(SIBLING)
        found[sandbox.name] = own
    return found


class _Evidence:
    """The observations of a run, for looking things up."""

    def __init__(self, plan: Plan, observations: Observations) -> None:
        self.plan = plan
        observations = {**observations, **_of_sandboxes(plan.fleet, observations)}
        self.observations = observations
        self.results = {
            (vantage, result["id"]): result
            for vantage, seen in observations.items()
            for result in (seen.get("probed") or {}).get("results") or ()
        }
        self.payloads: dict[str, set[str]] = {}
        self.connections: dict[str, set[tuple[str, int, int | None]]] = {}
        for host in observations:
            account = self._account(host)
            if account is None:
                continue
            ports = {
                entry["id"]: entry.get("port")
                for entry in (observations[host].get("listening") or {}).get("listeners") or ()
            }
            self.payloads[host] = {r["payload"] for r in account["received"] if r["payload"]}
            self.connections[host] = {
                *((r["source"], r["source_port"], r["port"]) for r in account["half_open"]),
                *(
                    (r["source"], r["source_port"], ports.get(r["listener"]))
                    for r in account["received"]
                    if not r["payload"]
                ),
            }
        # (address, protocol, port) -> who got an answer from there, and how.
        self.answers: dict[tuple[str, str, int | None], list[tuple[str, str, str]]] = {}
        for cell in plan.cells:
            if cell.kind not in (SERVICE, CONTROL):
                continue
            for probe in cell.probes:
                result = self.results.get((cell.vantage, probe.id))
                if result and result["outcome"] in _ANSWERED:
                    self.answers.setdefault(_place(probe), []).append(
                        (cell.vantage, result["outcome"], result["evidence"])
                    )

    def _account(self, host: str) -> Mapping[str, Any] | None:
        """What the host's listener received, if it is the one that was started for this run."""
        seen = self.observations.get(host) or {}
        account, started = seen.get("collected"), seen.get("listening")
        if not account or not started or not account.get("was_running"):
            return None
        if account.get("is_incomplete") or account.get("handle") != started.get("handle"):
            return None
        return account  # type: ignore[no-any-return]

    def problem(self, host: str) -> str | None:
        """Why a host could not be asked; None when it could."""
        return (self.observations.get(host) or {}).get("problem")

    def missing_account(self, target: str) -> str | None:
        """Why it is not known what arrived at a host of the fleet."""
        host = self.plan.fleet.hosts[target]
        if host.external or target in self.payloads:
            return None
        return self.problem(target) or "what its listener received is not known"

    def of(self, cell: Cell, probe: Probe) -> Seen:
        result = self.results.get((cell.vantage, probe.id))
        if result is None:
            why = self.problem(cell.vantage) or "there is no result of it"
            return Seen(probe, "missing", f"not tried: {why}")
        arrived = None
        where = self.plan.fleet.hosts[cell.target].owner or cell.target
        if result.get("payload") and result["payload"] in self.payloads.get(where, ()):
            arrived = f"{where} received it"
        elif result.get("source_port"):
            key = (result["source"], result["source_port"], probe.port)
            if cell.service.protocol == "tcp" and key in self.connections.get(where, ()):
                arrived = f"{where} received its first packet"
        return Seen(probe, result["outcome"], result["evidence"], arrived)

    def control(self, cell: Cell, probe: Probe, outcomes: Sequence[str] = _ANSWERED) -> str | None:
        """Who else got an answer from there: another vantage rather than the target itself."""
        own = (cell.target, self.plan.fleet.hosts[cell.target].owner)
        found = [
            (vantage in own, f"{vantage} at {probe.address}: {evidence}")
            for vantage, outcome, evidence in self.answers.get(_place(probe), ())
            if vantage != cell.vantage and outcome in outcomes
        ]
        return min(found, key=lambda entry: entry[0])[1] if found else None


def _place(probe: Probe) -> tuple[str, str, int | None]:
    return str(ip_address(probe.address)), probe.protocol, probe.port


def _control_finding(cell: Cell, seen: tuple[Seen, ...]) -> Finding:
    is_reached = any(s.is_answered for s in seen)
    return Finding(cell, "control", is_reached, seen, None, f"{cell}: {_summary(seen)}.")


def _judge_service(cell: Cell, seen: tuple[Seen, ...], evidence: _Evidence) -> Finding:
    answered = [s for s in seen if s.is_answered]
    one_way = [s for s in seen if not s.is_answered and s.arrived]
    sandbox = sandboxes(evidence.plan.fleet).get(cell.vantage)
    silent = _SILENT_IN_JOBS if sandbox and sandbox.kind == JOB else _SILENT
    unknown = [s for s in seen if not s.is_answered and s.outcome not in silent]
    declared = f"flow {cell.flow.index} ({cell.flow})" if cell.flow else None

    def found(verdict: str, what: str, control: str | None = None) -> Finding:
        is_reached = bool(answered or one_way)
        return Finding(cell, verdict, is_reached, seen, control, f"{cell}: {what}.")

    if cell.flow is None and (answered or one_way):
        how = _summary(answered or one_way)
        verb = "reached" if answered else "reached without an answer"
        return found(LEAK, f"{verb} ({how}), but no flow allows it")
    if cell.flow is not None and answered:
        rejected = _rejected(cell, answered, evidence)
        if rejected is None:
            return found(AS_DECLARED, f"reached ({_summary(answered)}), as {declared} allows")
        return found(
            BROKEN,
            f"refused ({_summary(answered)}) where others are accepted ({rejected}), though {declared}"
            " allows it",
        )
    problem = (
        cell.problem or evidence.problem(cell.vantage) or (_summary(unknown) if unknown else None)
    )
    if problem is None and not seen:
        problem = "there was nothing to try"
    if problem:
        return found(UNPROVEN, f"unproven: {problem}")
    if cell.flow is not None:
        where = evidence.plan.fleet.hosts[cell.target].owner or cell.target
        if evidence.problem(where):
            return found(UNPROVEN, f"unproven: {where}: {evidence.problem(where)}")
        return found(BROKEN, f"not reached ({_summary(seen)}), though {declared} allows it")
    lacking = evidence.missing_account(cell.target)
    if lacking:
        return found(
            UNPROVEN, f"unproven: not reached ({_summary(seen)}), but {cell.target}: {lacking}"
        )
    controls = []
    for one in seen:
        control = evidence.control(cell, one.probe)
        if control is None:
            return found(
                UNPROVEN,
                f"unproven: not reached ({_summary(seen)}), but nobody else got an answer from"
                f" {one.probe.address} either, so that shows nothing",
            )
        controls.append(control)
    return found(
        AS_DECLARED, f"not reached ({_summary(seen)}), and no flow allows it", "; ".join(controls)
    )


def _rejected(cell: Cell, answered: Sequence[Seen], evidence: _Evidence) -> str | None:
    """Who is accepted where this vantage is refused everywhere; a closed port refuses everybody."""
    if any(s.outcome == "open" for s in answered):
        return None
    for one in answered:
        accepted = evidence.control(cell, one.probe, ("open",))
        if accepted:
            return accepted
    return None


def _judge_forged(cell: Cell, seen: tuple[Seen, ...], evidence: _Evidence) -> Finding:
    (one,) = seen

    def found(verdict: str, what: str, control: str | None = None) -> Finding:
        return Finding(cell, verdict, bool(one.arrived), seen, control, f"{cell}: {what}.")

    if one.arrived:
        return found(LEAK, f"a forged packet got in ({one.evidence}; {one.arrived})")
    if one.outcome not in ("sent", *_SILENT):
        return found(UNPROVEN, f"unproven: {one.evidence}")
    lacking = evidence.missing_account(cell.target)
    if lacking:
        return found(UNPROVEN, f"unproven: {one.evidence}, but {cell.target}: {lacking}")
    # The honest one, to the same address: it must have come in.
    honest = next(
        (
            s
            for other in evidence.plan.cells
            if (other.kind, other.vantage, other.target, other.service, other.path)
            == (SERVICE, cell.claimed, cell.target, cell.service, cell.path)
            for probe in other.probes
            if probe.address == one.probe.address and (s := evidence.of(other, probe)).arrived
        ),
        None,
    )
    if honest is None:
        return found(
            UNPROVEN,
            f"unproven: {one.evidence} and it did not arrive, but neither did what {cell.claimed}"
            " sent itself",
        )
    return found(
        AS_DECLARED,
        f"no forged packet got in ({one.evidence})",
        f"{cell.claimed} at {one.probe.address}: {honest.arrived}",
    )


def _summary(seen: Sequence[Seen]) -> str:
    """What was seen at each address; the address is said where there are several."""
    parts = []
    for one in seen:
        text = one.evidence
        if one.arrived and not one.is_answered:
            text = f"{text}, but {one.arrived}"
        parts.append(f"{one.probe.address}: {text}" if len(seen) > 1 else text)
    return "; ".join(parts) if parts else "nothing was tried"
