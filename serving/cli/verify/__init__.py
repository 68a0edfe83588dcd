"""`galerne verify`: proves from outside that a cluster serves, and that it cannot reach the outside where it must not.

It is what a newcomer runs after an installation and what `helm test` runs in a pod. It speaks plain HTTP to the
address it is given (no proxy, no redirect), needs nothing of the cluster but a key, and promises to leave a verdict
whatever it meets: every check passes, fails with what was seen, or is skipped with a reason.
"""

from serving.cli.verify.command import verify

__all__ = ["verify"]
