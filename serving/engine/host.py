"""`python -m serving.engine.host`: the process a vLLM engine lives in, beside its Ray replica.

vLLM starts further processes, its core and its workers. Started from here they are forks: the import of vLLM, by far
the longest part of a start on CPU, is paid once an engine and its pages are shared, where a spawn inside a Ray
actor pays for each. What ends this process ends them all: the kernel kills them with their parent.

Standard input brings one line, a `HostSpec`; its end means that the replica is gone. The descriptor named on the
command line takes one line back, `{"port": …, "phases_s": {…}, "capacity": {…}, "token_ids": …}` or `{"error": …}`.
SIGTERM drains and stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import setproctitle
import uvloop

from serving.cluster.processes import die_with_parent
from serving.engine.host_spec import HostSpec
from serving.engine.private_server import PrivateServer
from serving.engine.vllm_engine import VllmEngine
from serving.engine.warm_up import warm_up
from serving.errors import EngineError, GalerneError

TITLE = "galerne engine"
STDIN = 0
READ_BYTES = 65536


def main() -> int:
    """Run one engine; the exit status is 0 after a drain, 1 where the engine did not start or has died."""
    reply_fd = int(sys.argv[1])
    # Before anything changes the environment: a title's room is found by where the environment began, and vLLM's core
    # and workers, forks of this process, are told apart by their titles.
    setproctitle.setproctitle(TITLE)
    os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL))
    # The terminal's Ctrl-C reaches the whole group; the replica decides when an engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = HostSpec.model_validate_json(_read_line())
    setproctitle.setproctitle(f"{TITLE} {spec.model.id}")
    threading.Thread(target=_end_with_the_replica, daemon=True).start()
    return uvloop.run(_serve(spec, reply_fd))


async def _serve(spec: HostSpec, reply_fd: int) -> int:
    began_s = time.monotonic()
    # Nothing of what an import makes is garbage; vLLM turns collection on again when it freezes its heap.
    gc.disable()
    engine = VllmEngine(spec)
    try:
        app = await engine.start()
        server = PrivateServer(app, host=spec.host, token=spec.token, load=engine.load.now)
        engine.attach(server.server)
        await server.start()
        gc.enable()
        compile_s = await engine.compile_s()
        loaded_s = time.monotonic()
        await asyncio.to_thread(warm_up, f"http://{spec.host}:{server.port}", spec.token, spec.model)
    except GalerneError as error:
        _reply(reply_fd, {"error": str(error)})
        await engine.shutdown()
        return 1
    drain = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, drain.set)
    phases_s = {
        # Of this process: importing vLLM, its core and workers, the weights, the KV cache.
        "load": max(0.0, loaded_s - began_s - compile_s),
        "compile": compile_s,
        "warm_up": time.monotonic() - loaded_s,
    }
    facts = {"capacity": engine.capacity(), "token_ids": engine.token_ids}
    _reply(reply_fd, {"port": server.port, "phases_s": phases_s, **facts})
    asked = asyncio.create_task(drain.wait())
    ended = asyncio.create_task(server.wait_ended())
    await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
    healthy = asked.done()
    if healthy:
        await server.drain(spec.model.drain_timeout_s)
    await server.stop()
    await engine.shutdown()
    return 0 if healthy else 1


def _reply(descriptor: int, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(descriptor, json.dumps(message).encode() + b"\n")
    os.close(descriptor)


def _read_line() -> bytes:
    # Not sys.stdin: a fork while another thread reads from it would inherit its lock.
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(STDIN, READ_BYTES)
        if not part:
            raise EngineError("the replica went away before it said what to run")
        line += part
    return line


def _end_with_the_replica() -> None:
    while os.read(STDIN, READ_BYTES):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
