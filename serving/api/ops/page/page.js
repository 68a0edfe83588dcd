// The ops page. The key lives in this closure and nowhere else; what the gateway says becomes text, never markup.
"use strict";
(() => {
  const REFRESH_MS = 5000;
  const TIMEOUT_MS = 8000;
  const NONE = "–";
  let key = "";
  let timer = 0;
  let loading = false;
  let last = null;

  const byId = (id) => document.getElementById(id);
  const el = (name, content, kind) => {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    for (const part of [content ?? ""].flat()) made.append(part);
    return made;
  };

  const count = (value) => (value == null ? NONE : Math.round(value).toLocaleString("en"));
  const share = (value) => (value == null ? NONE : `${(100 * value).toFixed(value > 0.999 && value < 1 ? 2 : 1)} %`);
  const seconds = (value) => (value == null ? NONE : value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);
  const time = (epoch) => new Date(epoch * 1000).toLocaleTimeString("en-GB");
  const bytes = (value) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let step = 0;
    while (value >= 1000 && step < units.length - 1) { value /= 1000; step += 1; }
    return `${value.toFixed(step ? 1 : 0)} ${units[step]}`;
  };
  const duration = (value) =>
    value < 120 ? `${value} s` : value < 7200 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
  const statuses = (found) => {
    const parts = Object.entries(found).map(([status, number]) => `${status}: ${count(number)}`);
    return parts.length ? el("span", parts.join(", "), "soft") : "none";
  };

  // columns: [title, is a number]; rows: lists of contents.
  const table = (columns, rows) => {
    const head = el("tr", columns.map(([title, number]) => {
      const cell = el("th", title, number ? "number" : "");
      cell.scope = "col";
      return cell;
    }));
    const body = rows.map((row) => el("tr", row.map((content, i) => el("td", content, columns[i][1] ? "number" : "name"))));
    return el("table", [el("thead", head), el("tbody", body)]);
  };
  const facts = (pairs) => el("dl", pairs.map(([name, value]) => el("div", [el("dt", name), el("dd", value)])));

  const stateClass = { ready: "good", asleep: "quiet" };
  const objectiveName = { ttft: "first token", itl: "between tokens" };

  const attained = (slo) => {
    const hour = slo.attainment_1h;
    const value = hour ?? slo.attainment;
    const kind = value == null ? "quiet" : value >= 0.95 ? "good" : "bad";
    const seen = hour != null ? "of the last hour" : `of ${count(slo.requests)} here`;
    const said = value == null ? "no requests yet" : [el("span", share(value), kind), ` ${seen}`];
    return [`${objectiveName[slo.name]} ≤ ${seconds(slo.target_s)}`, said];
  };

  const model = (found) => {
    const cluster = found.cluster;
    const held = Object.values(found.held).reduce((sum, number) => sum + number, 0);
    const range = found.scaled ? `${found.min} to ${found.max ?? NONE}` : `${found.min}, fixed`;
    const pairs = [
      ["replicas ready", `${found.replicas.length} (${range})`],
      ["target", cluster.target == null ? NONE : [count(cluster.target), cluster.stale ? el("span", " held: stale", "soft") : ""]],
      ["ejected here", found.ejected ? el("span", count(found.ejected), "bad") : "0"],
      ["in flight here", count(found.in_flight)],
      ["held here", held ? el("span", `${count(held)}, oldest ${seconds(found.held_oldest_s)}`, "soft") : "0"],
      ["streams cut here", found.streams_cut ? el("span", count(found.streams_cut), "soft") : "0"],
      ["arrivals", cluster.arrivals_rps == null ? NONE : `${cluster.arrivals_rps.toFixed(1)} / s`],
      ["held, all gateways", count(cluster.held)],
      ["first token, p95", seconds(cluster.ttft_p95_s)],
      ["tokens in, 1 h", count(cluster.prompt_tokens)],
      ["tokens out, 1 h", count(cluster.output_tokens)],
      ...found.slo.map(attained),
    ];
    if (found.reasons.length) pairs.push(["deciding", found.reasons.join(", ")]);
    const kind = [found.task === "embed" ? "embeddings" : "text", ...(found.simulated ? ["simulated"] : [])].join(", ");
    const card = el("article", [
      el("div", [el("h3", [found.id, " ", el("span", kind, "quiet")]), el("span", found.state, stateClass[found.state] ?? "bad")], "head"),
      facts(pairs),
    ], "card");
    if (found.replicas.length) {
      const rows = found.replicas.map((replica) => [
        replica.id, count(replica.in_flight), count(replica.cluster.running), count(replica.cluster.waiting), share(replica.cluster.kv_use),
      ]);
      const columns = [["replica", false], ["in flight here", true], ["running", true], ["waiting", true], ["KV cache", true]];
      card.append(el("div", table(columns, rows), "scroll"));
    }
    return card;
  };

  const changes = (state) => {
    if (!state.prometheus.configured) return el("p", "Decisions are read from Prometheus, and none is configured.", "note");
    if (!state.changes.length) return el("p", "No target has changed within the last hour.", "note");
    const rows = state.changes.map((change) => [
      time(change.at_s), change.model, `${change.before} → ${change.after}`, change.reasons.join(", ") || NONE,
    ]);
    return el("div", table([["about", false], ["model", false], ["replicas", true], ["reasons", false]], rows), "scroll");
  };

  const tenants = (state) => {
    const rows = state.tenants.map((tenant) => [
      tenant.id,
      tenant.models === null ? "all" : tenant.models.join(", "),
      count(tenant.in_flight),
      count(tenant.requests),
      statuses(tenant.refused),
      `${bytes(tenant.request_bytes)} / ${bytes(tenant.response_bytes)}`,
      `${count(tenant.tokens.prompt)} (${count(tenant.tokens.cached)}) / ${count(tenant.tokens.completion)}`,
      tenant.hour === null ? NONE : count(tenant.hour.requests),
      tenant.hour === null ? NONE : statuses(tenant.hour.refused),
    ]);
    const columns = [
      ["tenant", false], ["models", false], ["in flight here", true], ["requests here", true], ["refused or failed here", false],
      ["bytes in / out here", true], ["tokens in (cached) / out here", true], ["requests, 1 h, all gateways", true], ["refused or failed, 1 h, all gateways", false],
    ];
    return table(columns, rows);
  };

  const scope = (state) => {
    const { gateway, prometheus } = state;
    const several = gateway.of > 1 || gateway.may_be_several;
    const which = `“Here” is this one gateway (process ${gateway.process}, up ${duration(gateway.up_s)}, ` +
      `${count(gateway.in_flight)} of at most ${count(gateway.most_in_flight)} requests in flight).`;
    const shed = Object.entries(gateway.shed).map(([why, number]) => `${why}: ${count(number)}`).join(", ");
    const refused = shed ? ` It has shed requests: ${shed}.` : "";
    const others = several ? ` ${gateway.of ?? "Several"} gateways serve this cluster, and another may answer next.` : "";
    const source = !prometheus.configured ? " No Prometheus is configured, so nothing is known of the whole cluster."
      : prometheus.age_s == null ? " Prometheus has not answered yet."
      : ` The whole cluster is as Prometheus knew it ${duration(Math.round(prometheus.age_s))} ago.`;
    const problem = prometheus.configured && prometheus.problem && prometheus.problem !== "not asked yet" ? ` ${prometheus.problem}.` : "";
    return [which + refused + others + source, el("span", problem, "bad")];
  };

  const show = (state) => {
    byId("version").textContent = state.version;
    byId("scope").replaceChildren(...scope(state));
    byId("models").replaceChildren(...state.models.map(model));
    byId("changes").replaceChildren(changes(state));
    byId("tenants").replaceChildren(tenants(state));
  };

  const say = (text, kind) => {
    byId("status").textContent = text;
    byId("status").className = kind;
  };

  const lock = (why) => {
    key = "";
    clearTimeout(timer);
    for (const id of ["models", "changes", "tenants", "scope"]) byId(id).replaceChildren();
    byId("view").hidden = byId("lock").hidden = true;
    byId("door").hidden = false;
    say(why, why ? "bad" : "quiet");
    byId("key").focus();
  };

  const load = async () => {
    if (!key || loading) return;
    const asked = key;
    clearTimeout(timer);
    loading = true;
    try {
      const answer = await fetch("ops/state", {
        headers: { authorization: `Bearer ${asked}` },
        cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(TIMEOUT_MS),
      });
      if (key !== asked) return;
      if (answer.status === 401 || answer.status === 403) {
        lock((await answer.json()).error.message);
        return;
      }
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const state = await answer.json();
      if (key !== asked) return;
      show(state);
      byId("door").hidden = true;
      byId("view").hidden = byId("lock").hidden = false;
      last = new Date();
      say(`updated ${last.toLocaleTimeString("en-GB")}`, "quiet");
    } catch (error) {
      if (key !== asked) return;
      const since = last ? ` What is shown is of ${last.toLocaleTimeString("en-GB")}.` : "";
      say(`No answer (${error.message}).${since}`, "bad");
    } finally {
      loading = false;
    }
    if (key && !document.hidden) timer = setTimeout(load, REFRESH_MS);
  };

  byId("door").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = byId("key").value.trim();
    byId("key").value = "";
    if (!/^[\x21-\x7e]+$/.test(given)) { say("A key has no spaces and only plain letters, digits and signs.", "bad"); return; }
    key = given;
    last = null;
    say("opening", "quiet");
    load();
  });
  byId("lock").addEventListener("click", () => lock(""));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });
  byId("key").focus();
})();
