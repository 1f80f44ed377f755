// The dashboard: asks the API once a second, and shows what it says.
"use strict";

const element = (id) => document.getElementById(id);
let key = sessionStorage.getItem("army-key") || "";
let timer = 0;

function say(text, bad) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", Boolean(bad));
}

async function api(method, path, body) {
  const headers = { Authorization: `Bearer ${key}` };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const value = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw Object.assign(new Error(value.detail), { status: answer.status });
  return value;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${units[unit]}`;
}

function rows(table, list) {
  const body = document.createElement("tbody");
  for (const cells of list) {
    const row = body.insertRow();
    for (const cell of cells) row.insertCell().append(cell);
  }
  element(table).tBodies[0].replaceWith(body);
}

function button(text, label, action) {
  const made = document.createElement("button");
  made.textContent = text;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", () => action().catch((error) => say(error.message, true)));
  return made;
}

function buttons(...all) {
  const cell = document.createDocumentFragment();
  cell.append(...all);
  return cell;
}

async function fork(template) {
  const start = performance.now();
  const { vms } = await api("POST", "/v1/vms", { template });
  const whole = (performance.now() - start).toFixed(1);
  const times = vms[0].fork;
  const running = (times.running_us / 1000).toFixed(1);
  say(`${vms[0].name}: running after ${running} ms, here after ${whole} ms`);
  await look();
}

async function act(method, path, done) {
  await api(method, path, method === "POST" ? {} : undefined);
  say(done);
  await look();
}

async function look() {
  const [hosts, templates, page] = await Promise.all([
    api("GET", "/v1/hosts"), api("GET", "/v1/templates"), api("GET", "/v1/vms?limit=500"),
  ]);
  rows("hosts", hosts.map((host) => [
    host.name, host.state, String(host.vms), size(host.capacity.memory_bytes),
    size(host.capacity.private_bytes), size(host.capacity.promised_bytes),
    size(host.capacity.available_bytes),
  ]));
  rows("templates", templates.map((it) => [
    it.name, size(it.memory_bytes), size(it.data_bytes), String(it.vms),
    `${it.ready} of ${it.standbys}`, button("Fork", `Fork ${it.name}`, () => fork(it.name)),
  ]));
  rows("vms", page.vms.map((vm) => [
    vm.name, vm.template, vm.state,
    vm.fork ? `${(vm.fork.running_us / 1000).toFixed(1)} ms` : "",
    vm.memory ? size(vm.memory.private_bytes) : "", vm.memory ? size(vm.memory.shared_bytes) : "",
    buttons(
      button("Terminal", `Terminal in ${vm.name}`, async () => terminal(vm)),
      button("Fork", `Fork ${vm.name}`, () => act("POST", `/v1/vms/${vm.id}/fork`, `${vm.name} was forked`)),
      button("Destroy", `Destroy ${vm.name}`, () => act("DELETE", `/v1/vms/${vm.id}`, `${vm.name} is gone`)),
    ),
  ]));
}

// A terminal of lines: what programs draw with cursor movements is for `army shell`.
let socket = null;

function plain(text) {
  return text.replace(/\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b[()][A-Z0-9]|\x1b[=>]|\r/g, "");
}

function terminal(vm) {
  if (socket) socket.close();
  const screen = element("screen");
  screen.textContent = "";
  element("terminal-vm").textContent = vm.name;
  element("terminal").hidden = false;
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const path = `${scheme}://${location.host}/v1/vms/${vm.id}/terminal?rows=24&columns=100`;
  socket = new WebSocket(path, ["army.terminal", `army.key.${key}`]);
  socket.binaryType = "arraybuffer";
  const decoder = new TextDecoder();
  socket.onmessage = (message) => {
    if (typeof message.data === "string") return;
    for (const character of plain(decoder.decode(message.data, { stream: true }))) {
      if (character === "\b") screen.textContent = screen.textContent.slice(0, -1);
      else if (character !== "\x07") screen.textContent += character;
    }
    screen.scrollTop = screen.scrollHeight;
  };
  socket.onclose = () => { screen.textContent += "\n[closed]"; };
  screen.focus();
}

const KEYS = { Enter: "\r", Backspace: "\x7f", Tab: "\t", Escape: "\x1b", ArrowUp: "\x1b[A", ArrowDown: "\x1b[B", ArrowRight: "\x1b[C", ArrowLeft: "\x1b[D" };

function type(text) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(new TextEncoder().encode(text));
}

element("screen").addEventListener("keydown", (event) => {
  let text = KEYS[event.key];
  if (!text && event.ctrlKey && /^[a-z]$/.test(event.key)) text = String.fromCharCode(event.key.charCodeAt(0) - 96);
  if (!text && !event.ctrlKey && !event.metaKey && event.key.length === 1) text = event.key;
  if (!text) return;
  event.preventDefault();
  type(text);
});
element("screen").addEventListener("paste", (event) => type(event.clipboardData.getData("text")));
element("hang-up").addEventListener("click", () => {
  if (socket) socket.close();
  element("terminal").hidden = true;
});

function open(known) {
  element("login").hidden = known;
  element("main").hidden = !known;
  element("leave").hidden = !known;
  clearInterval(timer);
  if (known) timer = setInterval(refresh, 1000);
}

async function refresh() {
  try {
    await look();
  } catch (error) {
    say(error.message || "the server does not answer", true);
    if (error.status === 401) { forget(); }
  }
}

function forget() {
  key = "";
  sessionStorage.removeItem("army-key");
  open(false);
}

element("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = element("key").value.trim();
  try {
    await look();
    sessionStorage.setItem("army-key", key);
    say("");
    open(true);
  } catch (error) {
    say(error.message || "the server does not answer", true);
  }
});
element("leave").addEventListener("click", forget);
open(Boolean(key));
if (key) refresh();
