"""The guard: our table holds our rules, be they confirmed or on trial, whoever changes it."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from typing import NoReturn

from ..linux import journal
from ..linux.nft_monitor import NftMonitor
from ..linux.sd_notify import notify
from . import host
from .compare import Item, compare, shown
from .instance import RulesError, Status
from .records import Loaded, digest
from .trial import GuardedTable, transaction

REMOVE, REPORT = "remove", "report"
FOREIGN_RULES = (REMOVE, REPORT)
"""What becomes of rules, elements, sets and chains that somebody else adds to our table."""

POLL_S = 5.0
# How long after its time the timer's rollback is left to the timer.
OVERDUE_S = 2.0
# Between two looks, however many notices there are.
PAUSE_S = 0.1
# While the table cannot be looked after.
RETRY_S = 1.0
# systemd ends a guard that it has not heard of for longer than that (WATCHDOG_MS of `installation`): one that was
# stopped says nothing. One that hangs says so itself.
ALIVE_S = 0.1
HANGS_S = 30.0


class Guard:
    def __init__(self, rules: GuardedTable, foreign_rules: str = REMOVE) -> None:
        self._rules = rules
        self._removes = foreign_rules == REMOVE
        self._reported: set[tuple[str, str]] = set()
        self._looked = time.monotonic()

    def run(self) -> NoReturn:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        monitor = NftMonitor(self._rules.instance.tables[0].split()[1])
        failure = ""
        started = False
        while True:
            try:
                self.look(monitor.take_author())
                failure = ""
            except (RulesError, OSError, ValueError) as error:
                if str(error) != failure:
                    failure = str(error)
                    self._rules.report(
                        "firewall_guard_failed",
                        f"The table cannot be looked after: {error}",
                        priority=journal.ERROR,
                    )
            self._looked = time.monotonic()
            if not started:
                notify("READY=1\nWATCHDOG=1")
                threading.Thread(target=self._say_alive, daemon=True).start()
                started = True
            time.sleep(PAUSE_S)
            monitor.wait(RETRY_S if failure else POLL_S)

    def _say_alive(self) -> None:
        """For as long as looks come to an end: on a busy host one may take longer than the watchdog waits."""
        while time.monotonic() < self._looked + HANGS_S:
            notify("WATCHDOG=1")
            time.sleep(ALIVE_S)

    def look(self, by: str = "") -> None:
        """Puts the table right if it is not; ``by`` is who changed it, if that is known."""
        started = time.monotonic()
        self._roll_back_what_is_overdue()
        records, kernel = self._rules.records, self._rules.table
        with records.lock():
            loaded = records.loaded()
            if loaded is None:
                if records.confirmed() is not None and records.open_pending() is None:
                    self._rules.restore_confirmed()
                return
            table = kernel.name_of(loaded["text"])
            missing, added = compare(table, loaded["listing"], kernel.listing(table))
            if loaded["expanded_sha256"] != digest(kernel.expanded(loaded["text"])):
                missing.append({"object": table, "text": "an interface's new hardware address"})
            repairs = bool(missing or (added and self._removes))
            if repairs:
                self._repair(table, loaded)
        if missing:
            self._report_repair(table, by, missing, added, (time.monotonic() - started) * 1000)
        self._report_foreign(by, [] if missing else added)

    def _roll_back_what_is_overdue(self) -> None:
        """What the timer should have done: it may have failed, or been stopped."""
        pending = self._rules.records.open_pending()
        if pending is None or host.uptime() < pending["deadline"] + OVERDUE_S:
            return
        try:
            self._rules.rollback(pending["token"])
        except RulesError as failure:
            if failure.status != Status.NOT_PENDING:
                raise

    def _repair(self, table: str, loaded: Loaded) -> None:
        """Loads the rules anew, which takes away what is not of them."""
        before = transaction()
        try:
            self._rules.table.load(loaded["text"])
        except RulesError:
            # They were loaded before, so this may pass; if not, the host must not stay open.
            time.sleep(0.5)
            before = transaction()
            try:
                self._rules.table.load(loaded["text"])
            except RulesError as failure:
                self._rules.load_minimal(str(failure))
                return
        live = self._rules.table.listing(table)
        if live is None or before is None or transaction() != before + 1:
            # Somebody was faster; the next look, which comes at once, sees what it was.
            return
        # Nobody but us has changed it, so these are our rules, even where they differ from what was
        # recorded: nft was updated and has other words for them, or an interface has a new address.
        new_address = loaded["expanded_sha256"] != digest(
            self._rules.table.expanded(loaded["text"])
        )
        if new_address or any(compare(table, loaded["listing"], live)):
            self._rules.record_loaded(loaded["text"], live, loaded["state"])

    def _report_repair(
        self, table: str, by: str, missing: list[Item], added: list[Item], elapsed_ms: float
    ) -> None:
        self._rules.report(
            "firewall_repaired",
            f"Repaired {table} after {by or 'somebody'}: missing was {shown(missing)}"
            + (f"; removed with it: {shown(added)}" if added else ""),
            priority=journal.WARNING,
            by=by,
            missing=json.dumps(missing),
            removed=json.dumps(added),
            elapsed_ms=f"{elapsed_ms:.0f}",
        )

    def _report_foreign(self, by: str, added: list[Item]) -> None:
        action = "removed" if self._removes else "reported"
        seen = {(item["object"], item["text"]) for item in added}
        for item in added:
            if (item["object"], item["text"]) in self._reported:
                continue
            self._rules.report(
                "firewall_foreign_rule",
                f"Not ours, added by {by or 'somebody'}, {action}: {shown([item])}",
                priority=journal.WARNING,
                by=by,
                object=item["object"],
                rule=item["text"],
                action=action,
            )
        # One that is gone and comes back is reported anew.
        self._reported = set() if self._removes else seen
