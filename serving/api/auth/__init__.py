"""Who is calling: API keys and tokens of identity providers, and what each opens.

Promises: what a caller is told does not depend on which of unknown, expired, revoked or elsewhere its key or token is;
that stands in the gateway's log and metric alone, by a reason of a fixed list. Nothing a tenant holds opens what is an
administrator's. Any bytes in a header are an answer, never an exception of another kind; no key, no token and no digest
appears in an error, a repr or a log.
"""

from serving.api.auth.door import Door
from serving.api.auth.identity import REASONS, Identity, Refused
from serving.api.auth.keys import AdminRing, KeyRing, digest, new_key

__all__ = ["REASONS", "AdminRing", "Door", "Identity", "KeyRing", "Refused", "digest", "new_key"]
