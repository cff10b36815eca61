"""New rules are loaded on trial: a timer of systemd's brings the earlier ones back unless they are
confirmed first. Only confirmed rules survive a reboot."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from pathlib import Path

from ..linux import journal
from . import host
from .compare import compare
from .instance import ROOT, Instance, RulesError, Status
from .records import Lifeline, Pending, Records, digest
from .table import Table


class GuardedTable:
    """One instance's table in the kernel, and what is recorded of it."""

    def __init__(self, instance: Instance, root: Path = ROOT) -> None:
        self.instance = instance
        self.table = Table(instance, root)
        self.records = Records(instance, root)

    # --- A trial

    def apply(
        self,
        text: str,
        lifeline: Lifeline | None,
        rollback_after_s: float,
        load_after_s: float,
        token: str,
    ) -> None:
        """Loads ``text`` on trial, at once or in the background after ``load_after_s``; whoever knows
        ``token`` can confirm it. ``lifeline`` of None: as recorded with the confirmed rules."""
        listing = self.table.check(text)
        with self.records.lock():
            earlier = self.records.open_pending()
            if earlier:
                left = max(0, earlier["deadline"] - host.uptime())
                raise RulesError(
                    Status.BUSY,
                    f"Other rules wait for confirmation and roll back in {left:.0f} s; confirm them, "
                    "roll them back, or wait.",
                )
            pending: Pending = {
                "token": token,
                "phase": "waiting",
                "error": None,
                "deadline": host.uptime() + rollback_after_s,
                "text": text,
                "listing": listing,
                "lifeline": lifeline or self.records.lifeline(),
            }
            # The rollback first: from here on nothing that happens to us can leave the new rules.
            self.records.set_pending(pending)
            self.records.forget_rolled_back()
            rollback = self._rollback_unit(token)
            try:
                _start_later(rollback, rollback_after_s, "rollback", "--token", token)
                if load_after_s:
                    load = f"{self.instance.name}-load-{token[:16]}"
                    _start_later(load, load_after_s, "load-pending", "--token", token)
            except RulesError:
                _stop_timer(rollback)
                self.records.forget_pending()
                raise
            if not load_after_s:
                self._load_pending(pending)

    def load_pending(self, token: str) -> None:
        """What :meth:`apply` put off."""
        with self.records.lock():
            pending = self.records.open_pending()
            if not pending or pending["token"] != token or pending["phase"] != "waiting":
                raise RulesError(
                    Status.NOT_PENDING, "These rules do not wait for being loaded any more."
                )
            self._load_pending(pending)

    def _load_pending(self, pending: Pending) -> None:
        try:
            self.table.load(pending["text"])
        except RulesError as failure:
            # Nothing was changed: a transaction that fails leaves the earlier rules.
            _stop_timer(self._rollback_unit(pending["token"]))
            self.records.set_pending({**pending, "phase": "failed", "error": str(failure)})
            raise
        self.record_loaded(pending["text"], pending["listing"], "pending")
        self.records.set_pending({**pending, "phase": "loaded"})
        self.report(
            "firewall_pending",
            "New rules are loaded and wait for confirmation",
            sha256=digest(pending["text"]),
        )

    def confirm(self, token: str | None) -> None:
        """Keeps the rules on trial; ``token`` of None: whatever they are."""
        with self.records.lock():
            pending = self.records.pending()
            if pending is None or (token and pending["token"] != token):
                back = self.records.rolled_back()
                if back and (token is None or back["token"] == token):
                    raise RulesError(
                        Status.NOT_PENDING,
                        "The rules were rolled back already; apply them again to try again.",
                    )
                raise RulesError(
                    Status.NOT_PENDING, "No rules wait for confirmation; apply some first."
                )
            if pending["phase"] == "failed":
                raise RulesError(Status.FAILED, f"The rules were not loaded: {pending['error']}")
            if pending["phase"] == "waiting":
                raise RulesError(
                    Status.BUSY, "The rules are not loaded yet; confirm them after that."
                )
            self.records.set_confirmed(pending["text"], pending["lifeline"])
            # A rollback that starts now finds nothing to do.
            self.records.forget_pending()
            loaded = self.records.loaded()
            listing = loaded["listing"] if loaded else pending["listing"]
            self.record_loaded(pending["text"], listing, "loaded")
            _stop_timer(self._rollback_unit(pending["token"]))
        self.report("firewall_confirmed", "The rules are confirmed", sha256=digest(pending["text"]))

    def rollback(self, token: str | None) -> str:
        """Back to the confirmed rules, or to no table where there are none; says which."""
        with self.records.lock():
            pending = self.records.open_pending()
            if pending is None or (token and pending["token"] != token):
                raise RulesError(
                    Status.NOT_PENDING,
                    "No rules wait for confirmation; there is nothing to roll back.",
                )
            state = self.restore_confirmed()
            self.records.set_rolled_back({"token": pending["token"], "state": state})
            self.records.forget_pending()
            if token is None:
                _stop_timer(self._rollback_unit(pending["token"]))
        words = {
            "none": "there were none before, so the table is removed",
            "loaded": "the earlier rules are back",
            "fallback": "the earlier rules did not load, only ssh from the controllers is admitted",
        }[state]
        self.report(
            "firewall_rolled_back",
            f"The new rules were not confirmed; {words}",
            priority=journal.WARNING,
            state=state,
        )
        return words

    def _rollback_unit(self, token: str) -> str:
        return f"{self.instance.name}-rollback-{token[:16]}"

    # --- The confirmed rules

    def load_confirmed(self) -> None:
        """At boot. Without confirmed rules there is nothing to do."""
        with self.records.lock():
            text = self.records.confirmed()
            if text is None or self.records.open_pending():
                return
            loaded = self.records.loaded()
            if loaded and loaded["text"] == text:
                table = self.table.name_of(text)
                if not any(compare(table, loaded["listing"], self.table.listing(table))):
                    return
            try:
                state = self.restore_confirmed()
            except Exception as error:
                # Whatever it is, the host must not come up open.
                self.load_minimal(str(error) or repr(error))
                state = "fallback"
        if state == "fallback":
            raise RulesError(
                Status.MINIMAL,
                f"{self.records.confirmed_path} did not load; only ssh from the controllers is "
                f"admitted until it is repaired: run '{self.instance.name} check' on it, then the "
                "role that these rules come from.",
            )

    def restore_confirmed(self) -> str:
        """Loads the confirmed rules, or removes the table where there are none; returns the state."""
        text = self.records.confirmed()
        if text is None:
            self.table.delete()
            self.records.forget_loaded()
            return "none"
        try:
            self.table.check_text(text)
            self.table.load(text)
        except RulesError as failure:
            self.load_minimal(str(failure))
            return "fallback"
        self.record_loaded(text, self._listing_of(text), "loaded")
        return "loaded"

    def load_minimal(self, reason: str) -> None:
        """Instead of rules that do not load; raises where the instance has no minimal set."""
        if not self.instance.minimal:
            raise RulesError(Status.FAILED, reason)
        text = minimal_rules(self.table.name_of(""), self.records.lifeline())
        self.table.load(text)
        self.record_loaded(text, self._listing_of(text), "fallback")
        self.report(
            "firewall_fallback",
            f"The confirmed rules did not load; only ssh from the controllers is admitted. {reason}",
            priority=journal.CRITICAL,
            reason=reason,
        )

    def _listing_of(self, text: str) -> str:
        """As the rules are listed; where no namespace can be made (the guard has no right to), as the
        table just loaded is."""
        try:
            return self.table.scratch_listing(text)
        except RulesError:
            return self.table.listing(self.table.name_of(text)) or ""

    def record_loaded(self, text: str, listing: str, state: str) -> None:
        self.records.set_loaded(
            {
                "state": state,
                "text": text,
                "listing": listing,
                "sha256": digest(text),
                "expanded_sha256": digest(self.table.expanded(text)),
            }
        )

    def remove(self) -> None:
        """Takes away the table and what is recorded of it."""
        with self.records.lock():
            pending = self.records.pending()
            if pending:
                _stop_timer(self._rollback_unit(pending["token"]))
            self.table.delete()
            self.records.remove()

    def report(
        self, event: str, message: str, priority: int = journal.NOTICE, **fields: object
    ) -> None:
        """An event in the journal."""
        journal.send(
            message, identifier=self.instance.name, priority=priority, event=event, **fields
        )


def minimal_rules(table: str, lifeline: Lifeline) -> str:
    """Rules for when the confirmed ones do not load: ssh from the controllers, nothing else.

    They use as little of the kernel as possible, because what the confirmed ones needed is what
    may be missing.
    """
    networks = []
    for address in lifeline["controllers"]:
        with contextlib.suppress(ValueError):
            networks.append(ipaddress.ip_network(address, strict=False))
    port = lifeline["ssh_port"]
    incoming = ['\t\tiifname "lo" accept']
    outgoing = ['\t\toifname "lo" accept']
    for network in networks:
        family = "ip" if network.version == 4 else "ip6"
        incoming.append(f"\t\t{family} saddr {network} tcp dport {port} accept")
        outgoing.append(
            f"\t\t{family} daddr {network} tcp sport {port} tcp flags & ack == ack accept"
        )
    if any(network.version == 6 for network in networks):
        # 135 and 136: IPv6's neighbour discovery.
        for lines in (incoming, outgoing):
            lines.append("\t\ticmpv6 type { 135, 136 } ip6 hoplimit 255 accept")
    chains = {"input": incoming, "output": outgoing, "forward": []}
    body = "".join(
        f"\tchain {hook} {{\n\t\ttype filter hook {hook} priority -10; policy drop;\n"
        + "".join(f"{line}\n" for line in lines)
        # For an instant of its table's replacement, a new chain's policy is to accept.
        + "\t\tdrop\n\t}\n"
        for hook, lines in chains.items()
    )
    return f"{table} {{\n{body}}}\n"


def _start_later(unit: str, seconds: float, *arguments: str) -> None:
    """Runs this program later, whatever becomes of the caller and its session."""
    command = [
        host.find_program("systemd-run", "systemd"),
        "--quiet",
        "--collect",
        f"--unit={unit}",
        f"--on-active={seconds:.3f}s",
        "--timer-property=AccuracySec=100ms",
        f"--property=SuccessExitStatus={Status.NOT_PENDING.value}",
        # A rollback that fails once (nft may time out) must not be the last attempt.
        "--property=Restart=on-failure",
        "--property=RestartSec=1s",
        sys.executable or "/usr/bin/python3",
        "-I",
        os.path.realpath(sys.argv[0]),
        *arguments,
    ]
    done = host.run(command)
    if done.returncode != 0:
        raise RulesError(
            Status.LACKING,
            f"The timer for the rollback cannot be started ({' '.join(done.stderr.split())}); "
            "nothing was changed: look at 'systemctl status'.",
        )


def _stop_timer(unit: str) -> None:
    host.run([host.find_program("systemctl", "systemd"), "stop", f"{unit}.timer"])
