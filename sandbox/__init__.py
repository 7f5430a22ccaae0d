"""Runs untrusted programs and returns the values they compute, never a verdict. Knows nothing of rewards.

with open_executor(num_workers=2) as executor:
    job = Job(uid="1", source="def f(x): return x + 1", calls=(Call(function="f", args=(1,)),))
    (execution,) = executor.run([job])
    execution.results[0].value  # 2
"""

if __name__ != "coupled.sandbox":
    raise ImportError("import coupled.sandbox, not sandbox: the folder is a package of the distribution 'coupled'")

from coupled.sandbox.cache import CachedExecutor, CacheStatistics
from coupled.sandbox.executor import NOT_CONTAINED, TIERS, LocalExecutor, open_executor
from coupled.sandbox.jail.codec import CodecError, Digest, Opaque
from coupled.sandbox.remote import RemoteExecutor
from coupled.sandbox.self_check import Check, run_self_check
from coupled.sandbox.types import (
    Call,
    CallResult,
    Execution,
    Executor,
    Isolation,
    Job,
    Limits,
    Outcome,
    Raised,
    SandboxUnavailable,
    TestProgram,
    Usage,
)

__all__ = [
    "NOT_CONTAINED",
    "TIERS",
    "CacheStatistics",
    "CachedExecutor",
    "Call",
    "CallResult",
    "Check",
    "CodecError",
    "Digest",
    "Execution",
    "Executor",
    "Isolation",
    "Job",
    "Limits",
    "LocalExecutor",
    "Opaque",
    "Outcome",
    "Raised",
    "RemoteExecutor",
    "SandboxUnavailable",
    "TestProgram",
    "Usage",
    "open_executor",
    "run_self_check",
]
