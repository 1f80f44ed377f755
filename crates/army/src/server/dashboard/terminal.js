// A terminal in a VM: xterm.js at this end of a WebSocket, the guest's agent at the other.

import { Terminal } from "/vendor/xterm.mjs";

const COLOURS = { background: "#111111" };

// What a character takes on the screen is only known to the terminal that drew one.
function fitting(terminal, box) {
  const screen = box.querySelector(".xterm-screen");
  if (!screen || !screen.clientWidth) return null;
  const width = screen.clientWidth / terminal.cols;
  const height = screen.clientHeight / terminal.rows;
  return {
    columns: Math.max(20, Math.floor(box.clientWidth / width) - 2),
    rows: Math.max(5, Math.floor(box.clientHeight / height)),
  };
}

/// Opens a shell of `vm` in `box`. The result's `close` ends it.
export function openTerminal(vm, key, box) {
  const terminal = new Terminal({ cursorBlink: true, scrollback: 5000, theme: COLOURS });
  terminal.open(box);
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const size = `rows=${terminal.rows}&columns=${terminal.cols}`;
  const socket = new WebSocket(
    `${scheme}://${location.host}/v1/vms/${vm.id}/terminal?${size}`,
    ["army.terminal", `army.key.${key}`],
  );
  socket.binaryType = "arraybuffer";
  const send = (bytes) => {
    if (socket.readyState === WebSocket.OPEN) socket.send(bytes);
  };
  const fit = () => {
    const now = fitting(terminal, box);
    if (!now || (now.columns === terminal.cols && now.rows === terminal.rows)) return;
    terminal.resize(now.columns, now.rows);
  };
  terminal.onData((text) => send(new TextEncoder().encode(text)));
  terminal.onBinary((text) => send(Uint8Array.from(text, (it) => it.charCodeAt(0))));
  terminal.onResize(({ rows, cols }) => send(JSON.stringify({ kind: "resize", rows, columns: cols })));
  socket.onopen = fit;
  socket.onmessage = (message) => {
    if (typeof message.data !== "string") terminal.write(new Uint8Array(message.data));
  };
  socket.onclose = () => terminal.write("\r\n[closed]\r\n");
  window.addEventListener("resize", fit);
  terminal.focus();
  return {
    close() {
      window.removeEventListener("resize", fit);
      socket.onclose = null;
      socket.close();
      terminal.dispose();
    },
  };
}
