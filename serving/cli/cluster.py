"""`galerne cluster …`: an operator's commands for a cluster on Kubernetes.

Exit codes: 0 as it should be; 1 the cluster could not be asked, or refused; 2 a values or configuration file that
cannot be used; 3 it was asked, and the answer is no: a finding that fails, an unhealthy service, a rollout taken back,
a drain that is not complete.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from serving.errors import ApiDenied, ApiMissing, ClusterError

if TYPE_CHECKING:
    from serving.cluster.kubernetes.client import Client
    from serving.cluster.kubernetes.prometheus import Prometheus
    from serving.cluster.kubernetes.resources import Document

app = typer.Typer(no_args_is_help=True, help="A cluster on Kubernetes: look, roll out, drain, ask for help.")
NO = 3
# Tables are for reading and for files: no cutting at the width of a narrow terminal.
WIDTH = 150
WATCH_S = 5

Kubeconfig = Annotated[
    str | None, typer.Option(envvar="KUBECONFIG", help="Kubeconfig; without: the pod's own account, or ~/.kube/config.")
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig; without: its current one.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace; without: the context's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
PrometheusAt = Annotated[
    str | None,
    typer.Option(
        "--prometheus", help="http://HOST:PORT, or service:NAMESPACE/NAME:PORT through the API server's proxy."
    ),
]
ServiceName = Annotated[
    str | None, typer.Option("--service", help="The RayService; without: the namespace's only one.")
]


@dataclass(frozen=True, slots=True)
class Connection:
    """A client and the namespace that is meant."""

    client: Client
    namespace: str

    def prometheus(self, where: str | None) -> Prometheus | None:
        """Prometheus, where one is named."""
        from serving.cluster.kubernetes.prometheus import reach

        return reach(where, self.client) if where else None

    def service(self, name: str | None) -> Document:
        """The RayService of this name, or the only one."""
        from serving.cluster.kubernetes.resources import RAY_SERVICES, name_of

        try:
            found = self.client.list(RAY_SERVICES, self.namespace).items
        except ApiMissing as error:
            raise ClusterError(
                "the API server knows no RayService: KubeRay is not installed (see `galerne cluster preflight`)"
            ) from error
        chosen = [service for service in found if name in {None, name_of(service)}]
        if len(chosen) == 1:
            return chosen[0]
        names = ", ".join(name_of(service) for service in found) or "none"
        raise ClusterError(
            f"no RayService {name} in namespace {self.namespace}; there: {names}"
            if name
            else f"namespace {self.namespace} has not exactly one RayService ({names}): name it with --service, or -n"
        )


@contextmanager
def _connected(kubeconfig: str | None, context: str | None, namespace: str | None) -> Iterator[Connection]:
    """A connection; a refusal gets the rule that would have let it through."""
    from serving.cluster.kubernetes.client import connect
    from serving.cluster.kubernetes.permissions import lacking

    client, default = connect(kubeconfig, context)
    try:
        yield Connection(client, namespace or default)
    except ApiDenied as error:
        if error.status == 401:  # noqa: PLR2004  # HTTP: not authenticated
            raise ClusterError(f"{error}. The API server does not know you: renew the kubeconfig's login.") from error
        raise ClusterError(f"{error}. It would take {lacking(error)}.") from error
    finally:
        client.close()


def _console() -> Console:
    return Console(file=sys.stdout, width=WIDTH)


def _progress(quiet: bool = False) -> Callable[[str], None]:
    console = Console(stderr=True)
    return lambda line: None if quiet else console.print(line, style="dim", markup=False, highlight=False)


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")


@app.callback()
def _group() -> None:
    """A cluster on Kubernetes: look, roll out, drain, ask for help."""


@app.command()
def preflight(
    values: Annotated[
        list[Path] | None, typer.Option("--values", "-f", help="Values file of the chart; later ones win. Repeatable.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is a failure too.")] = False,
    as_json: AsJson = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Look whether a cluster can hold the release before it is installed. Changes nothing, sends nothing outside."""
    from serving.cli import cluster_tables as tables
    from serving.cluster.kubernetes import checks, facts, findings
    from serving.cluster.kubernetes import values as chart
    from serving.cluster.kubernetes.client import in_pod

    needs = chart.read(values) if values else chart.Needs()
    with _connected(kubeconfig, context, namespace) as to:
        found = checks.check(facts.gather(to.client, to.namespace, in_pod=in_pod()), needs)
        worst = findings.worst(found)
        if as_json:
            _print_json({"worst": worst, "findings": [finding.document() for finding in found]})
        else:
            _console().print(tables.findings(found, to.client.address, to.namespace))
    sys.exit(NO if worst == "fail" or (strict and worst == "warn") else 0)


@app.command()
def status(
    service: ServiceName = None,
    prometheus: PrometheusAt = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Print again whenever the service changes.")] = False,
    as_json: AsJson = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Show models, pods, replicas, attainment and decisions of a release."""
    from serving.cli import cluster_tables as tables
    from serving.cluster.kubernetes.resources import RAY_SERVICES, name_of
    from serving.cluster.kubernetes.status import read
    from serving.cluster.kubernetes.watch import Watch

    with _connected(kubeconfig, context, namespace) as to:
        source = to.prometheus(prometheus)
        found = to.service(service)

        def show(current: Document) -> bool:
            joined = read(to.client, to.namespace, current, source)
            if as_json:
                _print_json(joined.document())
            else:
                for part in tables.status(joined, to.namespace):
                    _console().print(part)
            return joined.healthy()

        healthy = show(found)
        if watch:
            watched = Watch(to.client, RAY_SERVICES, to.namespace, name=name_of(found)).events()
            with closing(watched) as events, suppress(KeyboardInterrupt):
                next(events)  # what was just shown
                for event in events:
                    if event is not None:
                        healthy = show(event.document)
    sys.exit(0 if healthy else NO)


@app.command()
def rollout(
    image: Annotated[str | None, typer.Option(help="The new version's image.")] = None,
    group_image: Annotated[
        list[str] | None,
        typer.Option(help="GROUP=IMAGE: the new one of a worker group that has its own. Repeatable."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The new version's configuration file.")] = None,
    config_from: Annotated[
        str | None, typer.Option(help="A Secret (or ConfigMap) of yours with it, in place of --config.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="With --config-from: what its first line names.")] = None,
    share: Annotated[int, typer.Option(min=1, max=100, help="Traffic moves by so many percent at a time.")] = 20,
    observe_s: Annotated[float, typer.Option(min=1.0, help="Each share is held and observed so long.")] = 600.0,
    min_requests: Annotated[int, typer.Option(min=1, help="Fewer requests of a share are no verdict.")] = 200,
    most_missed: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of requests that may miss a target.")
    ] = 0.05,
    most_failed: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of requests that may fail.")] = 0.01,
    start_s: Annotated[float, typer.Option(min=1.0, help="The new version must be ready within it.")] = 3600.0,
    give_up_s: Annotated[
        float, typer.Option(min=1.0, help="Without a verdict so long after a share's time: back.")
    ] = 7200.0,
    model: Annotated[list[str] | None, typer.Option(help="Judge this model alone. Repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the rollout under way.")] = False,
    back: Annotated[bool, typer.Option("--back", help="Take the rollout under way back.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    service: ServiceName = None,
    prometheus: PrometheusAt = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Bring a new version to users share by share, and back where it misses its targets."""
    from serving.cli import cluster_rollout as steps
    from serving.cluster.kubernetes.rollout import Plan

    plan = Plan(
        share=share,
        observe_s=observe_s,
        min_requests=min_requests,
        most_missed=most_missed,
        most_failed=most_failed,
        start_s=start_s,
        give_up_s=give_up_s,
    )
    wanted = steps.Wanted(image, config, config_from, revision, tuple(group_image or ()))
    with ExitStack() as stack:
        to = stack.enter_context(_connected(kubeconfig, context, namespace))
        run = stack.enter_context(closing(steps.Run(to, service, prometheus, tuple(model or ()), _progress())))
        if resume or back:
            verdict = run.go_on(back=back)
        else:
            prepared = run.prepare(wanted, plan)
            for line in prepared.lines:
                _console().print(line, markup=False, highlight=False, soft_wrap=True)
            if dry_run:
                return
            if not yes:
                typer.confirm("Begin?", abort=True)
            verdict = run.begin(prepared)
        _console().print(f"{verdict.action}: {verdict.reason}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(0 if verdict.action == "done" or back else NO)


@app.command()
def drain(
    node: Annotated[str | None, typer.Option(help="Cordon this node and move its pods.")] = None,
    group: Annotated[str | None, typer.Option(help="Empty this worker group and leave it empty.")] = None,
    cluster: Annotated[str | None, typer.Option(help="The group's RayCluster; without: the only one with it.")] = None,
    limit_s: Annotated[float, typer.Option(min=1.0, help="Give up after so long.")] = 3600.0,
    with_head: Annotated[bool, typer.Option("--with-head", help="Evict a head pod on the node too.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Uncordon, or give the group its bounds again.")] = False,
    as_json: AsJson = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Take a node or a worker group out of service; streams finish, disruption budgets are kept."""
    from serving.cli import cluster_tables as tables
    from serving.cluster.kubernetes.drain import Drain, cluster_with, complete

    if (node is None) == (group is None):
        raise typer.BadParameter("name either --node or --group")
    with _connected(kubeconfig, context, namespace) as to:
        progress = _progress()
        one = Drain(to.client, to.namespace, limit_s, clock=time.monotonic, pause=time.sleep, tell=progress)
        reports: tuple[Any, ...] = ()
        if node is not None:
            if undo:
                one.node_back(node)
            else:
                reports = one.node(node, head_too=with_head)
        else:
            where = cluster or cluster_with(to.client, to.namespace, str(group))
            if undo:
                one.group_back(where, str(group))
            else:
                reports = one.group(where, str(group))
        if as_json:
            _print_json({"complete": complete(reports), "pods": [report.document() for report in reports]})
        elif not undo:
            _console().print(tables.drained(reports))
    sys.exit(0 if complete(reports) else NO)


@app.command()
def free(
    after_s: Annotated[
        float, typer.Option(min=0.0, help="What was asked to go less long ago is left to the operator.")
    ] = 360.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what hangs and why, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Let a removal end that hangs: take KubeRay's finalizers from what cannot be cleaned up any more."""
    from serving.cluster.kubernetes import removal

    def tell(line: str) -> None:
        if not as_json:
            _console().print(line, markup=False, highlight=False, soft_wrap=True)

    with _connected(kubeconfig, context, namespace) as to:
        found = removal.look(to.client, to.namespace, time.time(), after_s)
        if not found:
            tell(f"nothing hangs: no RayCluster or RayService of namespace {to.namespace} waits for a finalizer")
        for one in found:
            asked = f"asked to go {one.since_s // 60:.0f} min ago"
            tell(f"{one.kind} {one.name}: {asked}, waits for {one.finalizer}: {one.why}")
            if not one.may_go:
                tell("  left to the operator: its pods or its time are not over")
            else:
                tell(f"  the finalizer would be taken away{f'; what stays: {one.left}' if one.left else ''}")
        ready = [one for one in found if one.may_go]
        if ready and not dry_run:
            if not yes:
                typer.confirm(f"Take {len(ready)} finalizer(s) away?", abort=True, err=True)
            for one in ready:
                freed = removal.free(to.client, to.namespace, one)
                tell(f"{one.kind} {one.name}: {'freed' if freed else 'gone by itself'}")
        if as_json:
            _print_json({"removals": [one.document() for one in found], "freed": len(ready) if not dry_run else 0})
    sys.exit(0 if len(ready) == len(found) and not (dry_run and found) else NO)


@app.command("support-bundle")
def support_bundle(
    out: Annotated[Path | None, typer.Option(help="File to write; without: galerne-support-TIME.tar.gz.")] = None,
    service: ServiceName = None,
    prometheus: PrometheusAt = None,
    log_bytes: Annotated[int, typer.Option(min=1024, help="Most bytes of one container's log.")] = 512 * 1024,
    all_logs_bytes: Annotated[int, typer.Option(min=1024, help="Most bytes of all logs together.")] = 32 * 1024 * 1024,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Write objects, events, logs and metrics into one file, with secrets masked and Secrets left out."""
    from serving import __version__
    from serving.cluster.kubernetes.bundle import collect, write
    from serving.cluster.kubernetes.status import read

    now_s = time.time()
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    path = out or Path(f"galerne-support-{stamp}.tar.gz")
    with _connected(kubeconfig, context, namespace) as to:
        source = to.prometheus(prometheus)
        facts = {
            "galerne": __version__,
            "kubernetes": str(to.client.raw("/version").get("gitVersion") or ""),
            "namespace": to.namespace,
            "collected": stamp,
        }
        files = collect(
            to.client,
            to.namespace,
            source,
            facts=facts,
            reports=[("status", lambda: read(to.client, to.namespace, to.service(service), source).document())],
            log_bytes=log_bytes,
            all_logs_bytes=all_logs_bytes,
        )
    write(files, path, now_s)
    left_out = json.loads(files["manifest.json"])["left_out"]
    _console().print(f"{path}: {len(files)} files, {sum(map(len, files.values()))} bytes before compression")
    for line in left_out:
        _console().print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def permissions(
    command: Annotated[
        list[str] | None, typer.Argument(help="preflight, status, rollout, drain, free, support-bundle; without: all.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the roles.")] = "galerne-operator",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the release.")] = "galerne",
    monitoring: Annotated[
        str, typer.Option("--monitoring-namespace", help="Namespace of Prometheus, for --prometheus service:…")
    ] = "monitoring",
) -> None:
    """Print the roles that commands need, and no more, as YAML."""
    from serving.cluster.kubernetes.permissions import COMMANDS, roles

    chosen = command or list(COMMANDS)
    if unknown := sorted(set(chosen) - set(COMMANDS)):
        raise typer.BadParameter(f"no command {', '.join(unknown)}; there are {', '.join(COMMANDS)}")
    sys.stdout.write(yaml.safe_dump_all(roles(chosen, name, namespace, monitoring), sort_keys=False))
