# What ours use of Ansible's base class, which has no type information of its own.
from typing import Any

class LookupBase:
    _loader: Any
