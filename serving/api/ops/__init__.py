"""The ops page: what runs, who asks and what was decided, for whoever holds an administrator's key.

Why the key is held in the page's memory and not in a cookie: nothing is sent that the page's own script did not
send, so there is no request another site could forge; nothing is stored that could be stolen later or that a second
gateway would have to know; closing or reloading the tab forgets it. What remains is a script in the page that is not
ours, and the policy of its answers forbids every script, style and connection but those of this origin. The page
itself holds no fact and is served to anybody; every fact is in `/ops/state`, which asks for the key each time.
"""

from serving.api.ops.app import PATHS, Answer, Ops

__all__ = ["PATHS", "Answer", "Ops"]
