//! QEMU's monitor (QMP): a command and its answer at a time, and the events in between.
//!
//! Source: QEMU's `docs/interop/qmp-spec.rst`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// How long an answer or an event may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to a monitor.
pub(super) struct Monitor {
    lines: BufReader<UnixStream>,
    /// Events that came while an answer was waited for.
    events: Vec<Value>,
}

impl Monitor {
    /// Takes the greeting, and leaves the negotiation.
    pub(super) fn open(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        let mut monitor = Self {
            lines: BufReader::new(stream),
            events: Vec::new(),
        };
        monitor.line()?;
        monitor.command("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command, and waits for its answer.
    pub(super) fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let text = json!({ "execute": name, "arguments": arguments }).to_string();
        self.lines.get_mut().write_all(text.as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("QEMU: {name}: {answer}");
            }
        }
    }

    /// Waits until a migration, of either direction, has ended well.
    pub(super) fn migrated(&mut self) -> Result<()> {
        loop {
            let event = match self.events.is_empty() {
                true => self.line()?,
                false => self.events.remove(0),
            };
            if event["event"] != "MIGRATION" {
                continue;
            }
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed") => bail!("QEMU's migration failed"),
                _ => {}
            }
        }
    }

    /// A migration by way of a file that has each page at its place.
    pub(super) fn prepare_migration(&mut self) -> Result<()> {
        self.switch_on(&["mapped-ram", "events"])
    }

    /// Switches capabilities of migrations on.
    pub(super) fn switch_on(&mut self, names: &[&str]) -> Result<()> {
        let on = |name: &&str| json!({ "capability": name, "state": true });
        let capabilities: Vec<Value> = names.iter().map(on).collect();
        let capabilities = json!({ "capabilities": capabilities });
        self.command("migrate-set-capabilities", capabilities)?;
        Ok(())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.lines.read_line(&mut line).context("QEMU's monitor")?;
        anyhow::ensure!(length > 0, "QEMU has ended");
        serde_json::from_str(&line).with_context(|| format!("QEMU said {line:?}"))
    }
}

/// As the URI of a migration.
pub(super) fn file(path: &Path) -> String {
    format!("file:{}", path.display())
}
