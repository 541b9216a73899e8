// The engine's figures, from the Prometheus metrics: reading those takes them from nobody, as reading /metrics would.

import { ask } from "./server.js";

const EVERY = 2000; // milliseconds
const KEPT = 60; // readings in the curve
const NAMES = {
  running: "trtllm_num_requests_running",
  waiting: "trtllm_num_requests_waiting",
  cache: "trtllm_kv_cache_utilization",
  hits: "trtllm_kv_cache_hit_rate",
  generated: "trtllm_generation_tokens_total",
  answered: "trtllm_request_success_total",
  failed: "trtllm_request_error_total",
  firstSum: "trtllm_time_to_first_token_seconds_sum",
  firstCount: "trtllm_time_to_first_token_seconds_count",
};

/** Metric name to the sum of its samples. */
export function samples(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{[^}]*\})? (\S+)/.exec(line);
    if (match) found.set(match[1], (found.get(match[1]) ?? 0) + Number(match[2]));
  }
  return found;
}

export function watch(list, curve, onRefusal) {
  const rates = [];
  let before = null;

  async function look() {
    if (document.hidden) return;
    let known;
    try {
      known = samples(await (await ask("prometheus/metrics")).text());
    } catch (error) {
      before = null;
      onRefusal(error);
      return;
    }
    const now = performance.now();
    const of = (name) => known.get(NAMES[name]) ?? 0;
    const rate = before ? Math.max(0, ((of("generated") - before.generated) * 1000) / (now - before.at)) : 0;
    before = { generated: of("generated"), at: now };
    rates.push(rate);
    if (rates.length > KEPT) rates.shift();
    const first = of("firstCount") ? `${((of("firstSum") / of("firstCount")) * 1000).toFixed(0)} ms` : "–";
    show(list, [
      ["Running", of("running")],
      ["Waiting", of("waiting")],
      ["KV cache used", percent(of("cache"))],
      ["Prefix cache hits", percent(of("hits"))],
      ["Tokens/s, answered", rate.toFixed(0)],
      ["First token, mean", first],
      ["Answers", of("answered")],
      ["Failures", of("failed")],
    ]);
    draw(curve, rates);
  }

  look();
  setInterval(look, EVERY);
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;

function show(list, rows) {
  list.replaceChildren(
    ...rows.flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const described = document.createElement("dd");
      term.textContent = name;
      described.textContent = value;
      return [term, described];
    }),
  );
}

function draw(curve, rates) {
  const highest = Math.max(1, ...rates);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const points = rates.map((rate, i) => `${((240 * i) / (KEPT - 1)).toFixed(1)},${(46 - (44 * rate) / highest).toFixed(1)}`);
  line.setAttribute("points", points.join(" "));
  curve.replaceChildren(line);
}
