// The page: a conversation with the server, and its figures. Whatever a model says is put in as text, never as markup.

import { watch } from "./figures.js";
import { ask, events, key } from "./server.js";

const at = (id) => document.getElementById(id);
const conversation = [];
let asking = null; // the AbortController of the answer under way

function problem(message) {
  at("problem").textContent = message ?? "";
  at("problem").hidden = !message;
}

function refused(error) {
  if (error.status === 401) {
    at("key-row").hidden = false;
    at("served").textContent = "This server asks for an API key.";
  }
  return error.message;
}

async function connect() {
  try {
    const models = (await (await ask("v1/models")).json()).data;
    at("model").replaceChildren(...models.map((model) => new Option(model.id)));
    at("served").textContent = `${models[0].id}, up to ${models[0].max_model_len} tokens`;
    problem(null);
  } catch (error) {
    problem(refused(error));
  }
}

function bubble(role) {
  const box = document.createElement("div");
  box.className = `message ${role}`;
  const text = document.createElement("span");
  box.append(text);
  at("empty").hidden = true;
  at("messages").append(box);
  return { box, text };
}

/** Where an answer grows: its thoughts folded above its text, calls of tools below. */
function growing() {
  const { box, text } = bubble("assistant");
  box.classList.add("waiting");
  let thoughts = null;
  const calls = new Map();

  function think(more) {
    if (!thoughts) {
      const folded = document.createElement("details");
      const title = document.createElement("summary");
      title.textContent = "Reasoning";
      thoughts = document.createElement("span");
      folded.append(title, thoughts);
      box.prepend(folded);
    }
    thoughts.append(more);
  }

  function call(part) {
    let line = calls.get(part.index);
    if (!line) {
      line = document.createElement("div");
      line.className = "call";
      calls.set(part.index, line);
      box.append(line);
    }
    line.append((part.function.name ? `${part.function.name} ` : "") + (part.function.arguments ?? ""));
  }

  return {
    box,
    said: () => text.textContent,
    add(delta) {
      const follows = at("messages").scrollHeight - at("messages").scrollTop - at("messages").clientHeight < 80;
      if (delta.reasoning_content) think(delta.reasoning_content);
      if (delta.content) text.append(delta.content);
      for (const part of delta.tool_calls ?? []) call(part);
      if (follows) at("messages").scrollTop = at("messages").scrollHeight;
    },
  };
}

function request() {
  const system = at("system").value.trim();
  const wanted = {
    model: at("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (at("temperature").value !== "") wanted.temperature = Number(at("temperature").value);
  if (at("tokens").value !== "") wanted.max_completion_tokens = Number(at("tokens").value);
  return wanted;
}

async function send() {
  const text = at("text").value;
  if (!text.trim() || asking) return;
  if (!at("model").value) await connect();
  if (!at("model").value) return;
  problem(null);
  at("text").value = "";
  conversation.push({ role: "user", content: text });
  const mine = bubble("user");
  mine.text.textContent = text;
  at("messages").scrollTop = at("messages").scrollHeight;
  const answer = growing();
  asking = new AbortController();
  busy(true);
  const began = performance.now();
  let first = null;
  let usage = null;
  try {
    for await (const event of events("v1/chat/completions", request(), asking.signal)) {
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        if (first === null && Object.values(choice.delta).some((part) => part && part !== "assistant")) first = performance.now();
        answer.add(choice.delta);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") problem(refused(error));
  }
  if (answer.said()) {
    conversation.push({ role: "assistant", content: answer.said() });
  } else {
    // Nothing was said: the question is there to be asked again.
    if (!answer.box.querySelector("details, .call")) {
      conversation.pop();
      mine.box.remove();
      answer.box.remove();
      at("text").value = at("text").value || text;
    }
  }
  answer.box.classList.remove("waiting");
  tell(began, first, usage);
  asking = null;
  busy(false);
  at("text").focus();
}

function tell(began, first, usage) {
  if (first === null) return;
  const seconds = (performance.now() - first) / 1000;
  const told = [`first token after ${(first - began).toFixed(0)} ms`];
  if (usage) {
    const cached = usage.prompt_tokens_details.cached_tokens;
    told.push(`${usage.prompt_tokens} tokens read${cached ? ` (${cached} from the cache)` : ""}`);
    told.push(`${usage.completion_tokens} written`);
    if (usage.completion_tokens > 1) told.push(`${((usage.completion_tokens - 1) / seconds).toFixed(0)} tokens/s`);
  }
  at("last").textContent = told.join(" · ");
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("stop").addEventListener("click", () => asking?.abort());
at("clear").addEventListener("click", () => {
  asking?.abort();
  conversation.length = 0;
  at("messages").replaceChildren(at("empty"));
  at("empty").hidden = false;
  at("last").textContent = "";
  problem(null);
});
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", () => {
  key.set(at("key").value.trim());
  connect();
});

connect();
watch(at("figures"), at("rate"), refused);
