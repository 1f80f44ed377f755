//! The log of a command, on standard error.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts the log of a command: what `CLONE_LOG` asks for (`debug`, `clone_vmm=trace,warn`), else
/// warnings.
pub fn start() {
    let wanted: Option<Targets> = std::env::var("CLONE_LOG")
        .ok()
        .and_then(|text| text.parse().ok());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time();
    // Only a second call could fail, and there is none.
    let _ = tracing_subscriber::registry()
        .with(lines)
        .with(wanted.unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN)))
        .try_init();
}
