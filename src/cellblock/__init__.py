"""Cellblock's engine: runs untrusted programs in nsjail and says truthfully what they did."""

from cellblock.engine import Engine
from cellblock.job import Job, load_job, parse_job
from cellblock.result import JobResult

__version__ = "0.1.0"
__all__ = ["Engine", "Job", "JobResult", "load_job", "parse_job"]
