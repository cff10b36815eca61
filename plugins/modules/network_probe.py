#!/usr/bin/python
# Copyright: The Cellblock authors
# Apache License 2.0 (see LICENSE or https://www.apache.org/licenses/LICENSE-2.0)

from __future__ import annotations

DOCUMENTATION = r"""
module: network_probe
short_description: Tries who can be reached from this host, and says how it is known
version_added: 0.1.0
description:
  - With O(state=probed), tries all O(targets) at the same time and returns what happened to each.
  - With O(state=listening), a process on the host answers probes for O(duration_s) on every port of
    O(listeners) that no service has, and notes what it received; so a target without a service can
    be tried, and forged packets can be found where they should not arrive. It ends by itself.
  - With O(state=collected), that process is ended and what it received is returned.
  - On a host that gives jobs a network, it tries from real jobs and network slots as well
    (O(sandboxes)), and can hold a slot with listeners (O(sibling)).
  - It knows nothing of rules and of what should be; see C(playbooks/verify-isolation.yml).
  - Nothing that lasts is changed on the host, so that the task never reports a change. The process
    has one socket in C(/run/cellblock-probe), that of O(sibling) one in
    C(/run/cellblock-probe-sibling); they are gone when it ends.
options:
  state:
    description: What to do.
    type: str
    required: true
    choices: [listening, probed, collected]
  listeners:
    description:
      - For O(state=listening). An empty list starts nothing; the host's interfaces are returned.
      - When a process with these listeners is running already, it goes on and its time is counted
        anew. One with others is ended.
    type: list
    elements: dict
    default: []
    suboptions:
      id:
        description: By this it is named in the results.
        type: str
        required: true
      protocol:
        description: V(icmp) notes echo requests; it is the kernel that answers them.
        type: str
        required: true
        choices: [tcp, udp, icmp]
      port:
        description: Port; not for V(icmp).
        type: int
      payload:
        description: What is understood besides the prober's own datagrams.
        type: str
        choices: [nonce, dns, ntp]
        default: nonce
  duration_s:
    description: After this many seconds the listening process ends by itself. At most 3600.
    type: int
    default: 120
  targets:
    description: For O(state=probed).
    type: list
    elements: dict
    default: []
    suboptions:
      id:
        description: By this it is named in the results.
        type: str
        required: true
      address:
        description: IPv4 or IPv6 address. Names are not resolved.
        type: str
        required: true
      protocol:
        description:
          - V(icmp) is an echo request, ICMPv6 for an IPv6 address.
          - V(neighbour) asks on O(targets[].interface) who has the address, by ARP or neighbour
            discovery, past this host's own filter and tables.
          - V(spoofed_udp) and V(spoofed_icmp) send a packet with the forged source
            O(targets[].source) as this host would route it.
          - V(spoofed_frame) sends it in a frame of its own to O(targets[].mac), past this host's own
            filter; UDP when there is a port, otherwise an echo request.
          - V(neighbour) and the forged ones need root.
        type: str
        required: true
        choices: [tcp, udp, icmp, neighbour, spoofed_udp, spoofed_icmp, spoofed_frame]
      port:
        description: Port, for TCP and UDP.
        type: int
      source:
        description: The address to send from; for the forged ones, the forged one.
        type: str
      interface:
        description: Interface of this host, for link-local addresses and where frames are sent.
        type: str
      mac:
        description: Hardware address to send a V(spoofed_frame) to.
        type: str
      source_mac:
        description: Forged hardware address of a V(spoofed_frame); by default the interface's own.
        type: str
      payload:
        description: What a V(udp) probe sends. V(dns) and V(ntp) are requests that a real service
          answers.
        type: str
        choices: [nonce, dns, ntp]
        default: nonce
      expected:
        description: Whether an answer is expected. It is waited for up to four times O(timeout_ms), so
          that a busy host is no finding.
        type: bool
        default: false
  timeout_ms:
    description: How long to wait for answers. TCP's first retransmission comes after 1000 ms; the
      other protocols' is sent after two fifths of this time.
    type: int
    default: 2000
  sibling:
    description:
      - For O(state=listening). Listeners in a network slot of their own, for O(duration_s); so it
        can be tried whether a job can be reached. Nothing is done where jobs have no network.
    type: dict
    suboptions:
      policy:
        description: The network policy of the slot.
        type: str
        required: true
      listeners:
        description: As O(listeners).
        type: list
        elements: dict
        required: true
  sandboxes:
    description:
      - For O(state=probed). What is tried from jobs and slots of this host, at the same time as
        O(targets).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: By this it is named in the results.
        type: str
        required: true
      kind:
        description:
          - V(job) is a job of its own in the environment C(python), submitted with the command
            C(cellblock).
          - V(slot) is root in a network slot, which can forge packets too.
          - V(sibling) is the slot of O(sibling).
          - V(worker_container) is root in the worker container of this host, V(child_container) in a container that
            the engine in there runs.
        type: str
        required: true
        choices: [job, slot, sibling, worker_container, child_container]
      policy:
        description: The network policy, of V(job) and V(slot).
        type: str
      targets:
        description: As O(targets).
        type: list
        elements: dict
        required: true
requirements:
  - Linux, Python 3.9
  - root, but for V(tcp) and V(udp), and V(icmp) where C(net.ipv4.ping_group_range) allows it
attributes:
  check_mode:
    description: Nothing is sent and nothing is started; results are empty.
    support: full
  diff_mode:
    description: The module changes nothing.
    support: none
  idempotent:
    description: A second O(state=listening) or O(state=collected) leaves what is there as it is.
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: full
author:
  - The Cellblock authors
"""

EXAMPLES = r"""
- name: Answer on two ports for a minute
  cellblock.fleet.network_probe:
    state: listening
    duration_s: 60
    listeners:
      - {id: channel, protocol: tcp, port: 7443}
      - {id: names, protocol: udp, port: 53, payload: dns}

- name: Try who answers
  cellblock.fleet.network_probe:
    state: probed
    targets:
      - {id: channel, address: 192.0.2.15, protocol: tcp, port: 7443}
      - {id: channel6, address: "2001:db8::15", protocol: tcp, port: 7443}
      - {id: link, address: "fe80::15", interface: eth0, protocol: icmp}
      - {id: forged, address: 192.0.2.15, source: 192.0.2.1, protocol: spoofed_icmp}
  register: tried

- name: End the listeners and see what they received
  cellblock.fleet.network_probe:
    state: collected
"""

RETURN = r"""
results:
  description: One entry per target, in their order.
  returned: O(state=probed)
  type: list
  elements: dict
  contains:
    id:
      description: The target's id.
      type: str
    outcome:
      description:
        - V(open), the target answered; V(refused), it refused (RST, port unreachable), so the packet
          arrived; V(filtered), nothing came back; V(unreachable), this host or another on the way
          said that there is no way.
        - V(sent), a forged packet left; whether it arrived, the target's listener knows.
        - V(denied), whoever tried may open no socket for it.
        - V(error), it could not be tried.
      type: str
    evidence:
      description: How that is known. What a service said is in it in escaped form.
      type: str
    elapsed_ms:
      description: Time until that was known.
      type: float
    payload:
      description: Digest of what was sent, by which a listener's record of it is recognised.
      type: str
    source:
      description: Address that it was sent from.
      type: str
    source_port:
      description: Port that it was sent from.
      type: int
    mac:
      description: Hardware address of a neighbour that answered.
      type: str
sandboxes:
  description: By name, what was seen from there, C(results) as above or the C(problem) that it could
    not be tried; with O(state=collected), what the O(sibling) received.
  returned: O(state=probed) and O(state=collected)
  type: dict
job_network:
  description: Null where jobs have no network; else C(handle), C(listeners) and C(interfaces) of the
    O(sibling), with its slot's IPv4 address and, where jobs have IPv6, that address too; or the
    C(problem) that there is none.
  returned: O(state=listening)
  type: dict
interfaces:
  description: The host's interfaces that are up, with C(name), C(mac) and C(addresses) (C(address),
    C(prefix_length)).
  returned: O(state=listening)
  type: list
  elements: dict
own_addresses:
  description: All addresses of the host.
  returned: O(state=listening)
  type: list
  elements: str
listeners:
  description: The listeners, each with C(ipv4) and C(ipv6) being V(listening), V(busy) (a service has
    the port) or why it is impossible.
  returned: O(state=listening)
  type: list
  elements: dict
handle:
  description: Names the process, so that its records are not taken for another's; null when none runs.
  returned: O(state=listening) and O(state=collected)
  type: str
was_running:
  description: Whether there still was a process to end.
  returned: O(state=collected)
  type: bool
received:
  description: What it received, each once with C(count), C(listener), C(family), C(source),
    C(source_port), C(address) and, unless TCP, C(payload).
  returned: O(state=collected)
  type: list
  elements: dict
half_open:
  description: TCP connections whose first packet came in and whose handshake was never finished, with
    C(source), C(source_port) and C(port).
  returned: O(state=collected)
  type: list
  elements: dict
"""

import os  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402
from ansible_collections.cellblock.fleet.plugins.module_utils import (  # noqa: E402
    _network_sandbox,
    _reader,
)
from ansible_collections.cellblock.fleet.plugins.module_utils._network_listener import (  # noqa: E402
    LONGEST_S,
    check_listeners,
    collect,
    listen,
)
from ansible_collections.cellblock.fleet.plugins.module_utils._network_probe import (  # noqa: E402
    PAYLOADS,
    PROTOCOLS,
    ProbeError,
    check_targets,
    interfaces,
    own_addresses,
    probe,
)

LONGEST_MS = 60000
PAYLOAD = {"type": "str", "choices": list(PAYLOADS), "default": "nonce"}
LISTENERS = {
    "id": {"type": "str", "required": True},
    "protocol": {"type": "str", "required": True, "choices": ["tcp", "udp", "icmp"]},
    "port": {"type": "int"},
    "payload": PAYLOAD,
}
TARGETS = {
    "id": {"type": "str", "required": True},
    "address": {"type": "str", "required": True},
    "protocol": {"type": "str", "required": True, "choices": list(PROTOCOLS)},
    "port": {"type": "int"},
    "source": {"type": "str"},
    "interface": {"type": "str"},
    "mac": {"type": "str"},
    "source_mac": {"type": "str"},
    "payload": PAYLOAD,
    "expected": {"type": "bool", "default": False},
}
SIBLING = {
    "policy": {"type": "str", "required": True},
    "listeners": {"type": "list", "elements": "dict", "required": True, "options": LISTENERS},
}
SANDBOXES = {
    "name": {"type": "str", "required": True},
    "kind": {"type": "str", "required": True, "choices": list(_network_sandbox.KINDS)},
    "policy": {"type": "str"},
    "targets": {"type": "list", "elements": "dict", "required": True, "options": TARGETS},
}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "required": True,
                "choices": ["listening", "probed", "collected"],
            },
            "listeners": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": LISTENERS,
            },
            "duration_s": {"type": "int", "default": 120},
            "targets": {"type": "list", "elements": "dict", "default": [], "options": TARGETS},
            "sibling": {"type": "dict", "options": SIBLING},
            "sandboxes": {"type": "list", "elements": "dict", "default": [], "options": SANDBOXES},
            "timeout_ms": {"type": "int", "default": 2000},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module.params, module.check_mode)
    except ProbeError as problem:
        module.fail_json(msg=str(problem))
    # Arguments would come back with the results, and they are long.
    module.exit_json(changed=False, **result)


def run(params: dict[str, Any], is_check: bool) -> dict[str, Any]:
    if not 1 <= params["duration_s"] <= LONGEST_S:
        raise ProbeError(f"duration_s is {params['duration_s']}; use 1 to {LONGEST_S}.")
    if not 1 <= params["timeout_ms"] <= LONGEST_MS:
        raise ProbeError(f"timeout_ms is {params['timeout_ms']}; use 1 to {LONGEST_MS}.")
    if params["state"] == "probed":
        check_targets(params["targets"])
        for sandbox in params["sandboxes"]:
            check_sandbox(sandbox)
        if is_check:
            return {"results": [], "sandboxes": {}, "msg": "Check mode: nothing was tried."}
        _reader.when_unread(abandon)
        return probe_all(params["targets"], params["sandboxes"], params["timeout_ms"])
    if params["state"] == "listening":
        sibling = params["sibling"]
        check_listeners(params["listeners"])
        check_listeners(sibling["listeners"] if sibling else [])
        about = {"interfaces": interfaces(), "own_addresses": own_addresses(), "job_network": None}
        if is_check:
            about |= {"handle": None, "listeners": [], "msg": "Check mode: nothing was started."}
            return about
        about |= listen(params["listeners"], params["duration_s"])
        if sibling:
            about["job_network"] = _network_sandbox.start_sibling(
                sibling["policy"], sibling["listeners"], params["duration_s"]
            )
        return about
    if is_check:
        return {"msg": "Check mode: nothing was ended.", **nothing_collected()}
    return {**collect(), "sandboxes": {"sibling": _network_sandbox.collect_sibling()}}


def check_sandbox(sandbox: dict[str, Any]) -> None:
    check_targets(sandbox["targets"])
    if sandbox["kind"] in ("job", "slot") and not sandbox["policy"]:
        raise ProbeError(
            f"sandbox {sandbox['name']}: policy is missing; a {sandbox['kind']} needs one."
        )


def probe_all(
    targets: list[dict[str, Any]], sandboxes: list[dict[str, Any]], timeout_ms: int
) -> dict[str, Any]:
    """From this host and from its sandboxes at the same time."""
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(_network_sandbox.probe, sandboxes, timeout_ms)
        results = probe(targets, timeout_ms)
        return {"results": results, "sandboxes": others.result()}


def abandon() -> None:
    _network_sandbox.end_all()
    os._exit(1)


def nothing_collected() -> dict[str, Any]:
    return {"was_running": False, "handle": None, "received": [], "half_open": []}


if __name__ == "__main__":
    main()
