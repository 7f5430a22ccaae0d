"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const number = (value) => (value === null ? "\u2013" : String(Number(value.toPrecision(3))));

  // Plots: pointing at a step shows its values in the legend.
  for (const [id, plot] of Object.entries(data.plots)) {
    const figure = byId(id);
    const area = figure.querySelector(".plot");
    const outputs = [...figure.querySelectorAll("output")];
    const last = outputs.map((output) => output.textContent);
    const cursor = document.createElement("div");
    cursor.className = "cursor";
    cursor.hidden = true;
    area.append(cursor);
    const nearest = (xs, x) => xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);
    const point = (event) => {
      const box = area.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - plot.left) / (plot.right - plot.left);
      const x = plot.min + Math.min(1, Math.max(0, share)) * (plot.max - plot.min);
      const at = plot.lines[0].x[nearest(plot.lines[0].x, x)];
      plot.lines.forEach((line, i) => {
        const k = nearest(line.x, at);
        outputs[i].textContent = number(line.y[k]) + (i ? "" : " at " + plot.axis + " " + number(line.x[k]));
      });
      cursor.style.left = 100 * (plot.left + ((at - plot.min) / (plot.max - plot.min)) * (plot.right - plot.left)) + "%";
      cursor.hidden = false;
    };
    area.addEventListener("pointermove", point);
    area.addEventListener("pointerdown", point);
    area.addEventListener("pointerleave", () => {
      cursor.hidden = true;
      outputs.forEach((output, i) => { output.textContent = last[i]; });
    });
  }

  if (!byId("filters")) return;
  const PAGE = 50;
  const MASK = "\u25a2";
  const filters = byId("filters");
  const slider = byId("slider");
  let matching = [];
  let numShown = 0;
  let chosen = null;
  let steps = [];
  let timer = null;
  const HINT = MASK + " is still masked; positions after the end token are faint. Point at a token for its step, probability and entropy.";

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const taskOf = (item) => data.samples[item.run].tasks[item.task];

  // The list.
  const matches = (item, wanted) =>
    (wanted.run === "" || wanted.run === undefined || String(item.run) === wanted.run) &&
    (wanted.step === "" || String(item.step) === wanted.step) &&
    (wanted.state === "" || item.state === wanted.state) &&
    (wanted.finish === "" || item.finish === wanted.finish) &&
    (wanted.text === "" || (item.text + "\n" + item.task + "\n" + taskOf(item).prompt).toLowerCase().includes(wanted.text.toLowerCase()));

  const addResults = () => {
    const list = byId("results");
    for (const item of matching.slice(numShown, numShown + PAGE)) {
      const button = element("button");
      button.type = "button";
      const mark = item.state === "unjudged" ? "not judged" : item.state + " " + item.passed + "/" + item.total;
      button.append(element("span", mark, item.state), element("small", "step " + item.step + " \u00b7 " + item.task));
      button.addEventListener("click", () => choose(item, true));
      item.button = button;
      const row = element("li");
      row.append(button);
      list.append(row);
    }
    numShown = Math.min(matching.length, numShown + PAGE);
    byId("more").hidden = numShown >= matching.length;
  };

  const filter = () => {
    const wanted = Object.fromEntries(new FormData(filters));
    matching = data.rollouts.filter((item) => matches(item, wanted));
    byId("results").replaceChildren();
    numShown = 0;
    addResults();
    const passed = matching.filter((item) => item.state === "passed").length;
    byId("count").textContent = matching.length
      ? matching.length + " of " + data.rollouts.length + " shown rollouts match; " + passed + " of them passed all tests."
      : "No rollout matches. Widen a filter.";
    byId("detail").hidden = !matching.length;
    if (matching.length) choose(matching.includes(chosen) ? chosen : matching[0], false);
  };

  // One rollout.
  const choose = (item, isAsked) => {
    stop();
    if (chosen && chosen.button) chosen.button.removeAttribute("aria-current");
    chosen = item;
    item.button?.setAttribute("aria-current", "true");
    byId("detail").hidden = false;
    byId("detail-title").textContent = item.task + ", step " + item.step;
    const rewards = Object.entries(item.rewards).map(([name, value]) => name + " " + number(value)).join(", ");
    const badges = [
      element("span", item.state === "unjudged" ? "not judged" : item.state + ": " + item.passed + " of " + item.total + " tests", item.state),
      element("span", "reward " + number(item.score) + (rewards ? " (" + rewards + ")" : "")),
      element("span", item.length + " tokens, finished by " + item.finish),
      element("span", item.forwards + " forward passes"),
    ];
    if (data.samples.length > 1) badges.unshift(element("span", data.samples[item.run].name));
    if (item.is_cut) badges.push(element("span", "truncated to fit the page"));
    byId("detail-badges").replaceChildren(...badges);
    byId("detail-prompt").textContent = taskOf(item).prompt;
    byId("detail-program").textContent = item.code === null ? "No Python block in the completion:\n\n" + item.text : item.code;
    showTests(item);
    const hasTokens = Boolean(item.ids);
    byId("replay").hidden = !hasTokens;
    byId("no-replay").hidden = hasTokens;
    if (hasTokens) {
      steps = [...new Set(item.at.filter((at) => at >= 0))].sort((a, b) => a - b);
      slider.max = steps.length;
      slider.value = steps.length;
      byId("canvas").style.minHeight = "";
      showCanvas();
      byId("canvas").style.minHeight = byId("canvas").offsetHeight + "px";
    }
    if (isAsked && matchMedia("(max-width: 46rem)").matches) byId("detail").scrollIntoView();
  };

  const showTests = (item) => {
    const tests = taskOf(item).tests;
    const named = item.outcome === "ok" ? "" : "Outcome: " + item.outcome.replaceAll("_", " ") + (item.detail ? " (" + item.detail + ")" : "") + ". ";
    const each = item.per_test.length ? "" : item.total ? item.passed + " of " + item.total + " passed; this run has no verdicts on single tests." : "No tests were run.";
    byId("detail-outcome").textContent = named + each;
    byId("detail-outcome").hidden = !(named + each);
    // A test that is a program is judged in parts, so texts and verdicts do not pair up; at most 100 texts are kept.
    const isPaired = item.per_test.length === tests.length || (tests.length === 100 && item.per_test.length > 100);
    byId("detail-tests").replaceChildren(...item.per_test.map((passed, i) => {
      const row = element("li");
      const text = isPaired && i < tests.length ? tests[i] : (isPaired ? "test " : "part ") + (i + 1);
      row.append(element("span", passed ? "passed" : "failed", passed ? "passed" : "failed"), element("code", text));
      return row;
    }));
  };

  // The canvas after `slider.value` denoising steps.
  const shareOf = (item, k, shade) => {
    if (shade === "order") return 70 * (1 - steps.indexOf(item.at[k]) / Math.max(1, steps.length - 1));
    if (shade === "confidence") return item.logp[k] === null ? 0 : 70 * Math.exp(item.logp[k]);
    return item.entropy[k] === null ? 0 : 70 * Math.min(1, item.entropy[k] / 2);
  };

  const showCanvas = () => {
    const item = chosen;
    const vocabulary = data.samples[item.run].vocabulary;
    const shade = byId("shade").value;
    const done = Number(slider.value);
    const now = done ? steps[done - 1] : -1;
    let settled = 0;
    const tokens = item.ids.map((id, k) => {
      const at = item.at[k];
      const isBeyond = k >= item.length;
      if (at < 0 || at > now) return element("span", MASK, isBeyond ? "masked beyond" : "masked");
      settled += 1;
      const text = vocabulary[id];
      const span = element("span", isBeyond ? "\u00b7" : text, isBeyond ? "beyond" : "");
      if (!isBeyond && shade === "new" && at === now) span.className = "new";
      if (!isBeyond && shade !== "new") {
        span.className = "shaded";
        span.style.setProperty("--share", shareOf(item, k, shade).toFixed(1));
      }
      span.dataset.about = "Position " + (k + 1) + ", " + JSON.stringify(text) + ": step " + (at + 1) +
        (item.logp[k] === null ? "" : ", probability " + number(Math.exp(item.logp[k]))) +
        (item.entropy[k] === null ? "" : ", entropy " + number(item.entropy[k]) + " nats");
      return span;
    });
    byId("canvas").replaceChildren(...tokens);
    byId("token").textContent = HINT;
    const said = (done ? "step " + (now + 1) + " of " + (steps[steps.length - 1] + 1) : "all masked") + ", " + settled + " of " + item.ids.length + " tokens";
    byId("position").textContent = said;
    slider.setAttribute("aria-valuetext", said);
  };

  const stop = () => {
    clearInterval(timer);
    timer = null;
    byId("play").textContent = "Play";
  };

  byId("play").addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(slider.value) >= steps.length) slider.value = 0;
    byId("play").textContent = "Pause";
    showCanvas();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      showCanvas();
      if (Number(slider.value) >= steps.length) stop();
    }, Math.max(60, Math.min(300, 6000 / steps.length)));
  });
  slider.addEventListener("input", () => { stop(); showCanvas(); });
  for (const kind of ["pointerover", "click"]) {
    byId("canvas").addEventListener(kind, (event) => { byId("token").textContent = event.target.dataset.about || HINT; });
  }
  byId("shade").addEventListener("change", showCanvas);
  byId("more").addEventListener("click", addResults);
  // Some browsers report a selected option by only one of these events.
  for (const kind of ["input", "change"]) filters.addEventListener(kind, filter);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
