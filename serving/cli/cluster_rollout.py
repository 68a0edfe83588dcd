"""`galerne cluster rollout`: from what the operator wants to a rollout that runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from serving.cluster.kubernetes import versions
from serving.cluster.kubernetes.resources import RAY_SERVICES, Document, Resource, name_of
from serving.cluster.kubernetes.rollout import FINAL, Change, Plan, Verdict
from serving.cluster.kubernetes.rollout_run import Rollout, Target, begin, strategy_of, summary
from serving.cluster.kubernetes.watch import Event, Watch
from serving.config_file import load
from serving.errors import ApiConflict, ApiUnreachable, ClusterError, ConfigError

if TYPE_CHECKING:
    from serving.cli.cluster import Connection

SECRETS: Final = Resource("", "v1", "secrets")
# Between two looks at most; a change of the service is looked at once, but no faster than this.
POLL_S: Final = 10
LEAST_S: Final = 2.0
# While nothing is decided, a line so often.
TELL_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """The new version."""

    image: str | None = None
    config: Path | None = None
    config_from: str | None = None
    revision: str | None = None
    # GROUP=IMAGE, of groups that have an image of their own.
    group_images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A rollout that only has to be begun."""

    plan: Plan
    changes: tuple[Change, ...]
    revision: str
    secret: Document | None
    lines: tuple[str, ...]


class Run:
    """One rollout of one service."""

    def __init__(
        self,
        to: Connection,
        service: str | None,
        prometheus: str | None,
        models: tuple[str, ...],
        tell: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._to = to
        self._clock = clock
        self._pause = pause
        self._service = to.service(service)
        self._prometheus = to.prometheus(prometheus)
        name = name_of(self._service)
        self._watch = Watch(to.client, RAY_SERVICES, to.namespace, name=name, window_s=POLL_S, pause=pause)
        self._events: Generator[Event | None] = self._watch.events()
        waiting_s = -TELL_S

        def tell_now_and_then(_: str, verdict: Verdict) -> None:
            nonlocal waiting_s
            if verdict.action in FINAL:
                return  # the command's own last word
            if verdict.action != "wait":
                waiting_s = -TELL_S
            elif clock() < waiting_s + TELL_S:
                return
            else:
                waiting_s = clock()
            tell(f"{verdict.action}: {verdict.reason}")

        self._rollout = Rollout(
            to.client,
            self._prometheus,
            Target(to.namespace, name),
            models=models,
            clock=clock,
            wait=self._wait,
            tell=tell_now_and_then,
        )

    def prepare(self, wanted: Wanted, plan: Plan) -> Prepared:
        """What would be done, checked as far as it can be without doing it."""
        plan = replace(plan, incremental=strategy_of(self._service))
        changes, secret, revision = _changes(self._service, wanted, self._to.namespace)
        self._must_be_judged()
        begin(self._service, plan, changes, revision, self._clock())
        created = [f"Secret {name_of(secret)}"] if secret else []
        return Prepared(plan, changes, revision, secret, tuple(summary(plan, changes, created)))

    def begin(self, prepared: Prepared) -> Verdict:
        """Do it, until it is over."""
        if prepared.secret is not None:
            with contextlib.suppress(ApiConflict):  # its name says what is in it: an earlier attempt made it
                self._to.client.create(SECRETS, self._to.namespace, prepared.secret)
        self._rollout.start(prepared.plan, prepared.changes, prepared.revision)
        return self._run()

    def go_on(self, *, back: bool) -> Verdict:
        """Carry on with a rollout that is under way, or take it back."""
        if back:
            self._rollout.back("asked for by the operator")
        else:
            self._must_be_judged()
            self._rollout.resume()
        return self._run()

    def _run(self) -> Verdict:
        try:
            return self._rollout.run()
        except KeyboardInterrupt:
            self._rollout.halt()
            raise ClusterError(
                "interrupted; traffic stays where it is. `rollout --resume` goes on, `rollout --back` takes it back"
            ) from None

    def close(self) -> None:
        """End the watch."""
        self._events.close()

    def _must_be_judged(self) -> None:
        if self._prometheus is None:
            raise ClusterError("a rollout is judged by Prometheus' figures: name it with --prometheus")
        if self._prometheus.query("vector(1)") is None:
            raise ClusterError(f"a rollout is judged by Prometheus' figures: {self._prometheus.problem}")

    def _wait(self) -> None:
        self._pause(LEAST_S)
        try:
            next(self._events)
        except ApiUnreachable:
            self._pause(POLL_S)
            self._events = self._watch.events()


def _changes(service: Document, wanted: Wanted, namespace: str) -> tuple[tuple[Change, ...], Document | None, str]:
    """Changes, the Secret they need, and what names the version."""
    if not (wanted.image or wanted.config or wanted.config_from):
        raise ClusterError("name what is new: --image, --config or --config-from (or --resume, --back)")
    if wanted.config and wanted.config_from:
        raise ClusterError("--config and --config-from exclude each other: keep one")
    changes: list[Change] = []
    secret = None
    revision = wanted.revision or ""
    if wanted.config:
        text = _checked(wanted.config)
        revision = versions.revision_of(text)
        present = versions.config_volume(service)
        name = f"{name_of(service)}-config-{revision[:10]}"
        labels = {"app.kubernetes.io/part-of": "galerne", "app.kubernetes.io/component": "config"}
        secret = versions.new_secret(present, name, namespace, f"{versions.MARK} {revision}\n{text}", labels)
        changes += versions.config_changes(service, name, revision)
    elif wanted.config_from:
        if not revision:
            raise ClusterError(
                f"--revision is missing: what the first line of {wanted.config_from} names ({versions.MARK})"
            )
        changes += versions.config_changes(service, wanted.config_from, revision)
    if wanted.image:
        changes += versions.image_changes(service, wanted.image, dict(map(_group_image, wanted.group_images)))
        revision = revision or wanted.image
    elif wanted.group_images:
        raise ClusterError("--group-image is for a rollout with --image: every group gets the new version")
    return tuple(changes), secret, revision


def _group_image(text: str) -> tuple[str, str]:
    group, equals, image = text.partition("=")
    if not (group and equals and image):
        raise ClusterError(f"--group-image {text}: must be GROUP=IMAGE")
    return group, image


def _checked(path: Path) -> str:
    """The text of a configuration that pods can serve; raises ConfigError."""
    loaded = load(path)
    if loaded.listen.loopback:
        raise ConfigError((f"{path}: listen.host: {loaded.listen.host} is a pod's own; in a cluster it is 0.0.0.0",))
    auto = [m.id for m in loaded.models if not m.is_fake and m.resources.accelerator == "auto"]
    if auto:
        why = "says auto, which asks a cluster that starts, and it has no GPU yet; say gpu or cpu"
        raise ConfigError(tuple(f"{path}: models[{model}].resources.accelerator: {why}" for model in auto))
    return path.read_text(encoding="utf-8")
