//! The log of the VM's process, on standard error.

mod bounded;

use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use bounded::BoundedLog;

/// Starts the bounded log, at the levels that `CLONE_LOG` asks for, by default warnings.
pub(super) fn start() {
    let wanted = wanted();
    let log = BoundedLog::new(std::io::stderr(), wanted.is_none());
    let _ = tracing_subscriber::registry()
        .with(lines(log))
        .with(wanted.unwrap_or_else(warnings))
        .try_init();
}

/// Formats events as lines, for a writer that receives one whole line per call.
fn lines<S, W>(writer: W) -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(false)
        .without_time()
}

/// The levels that `CLONE_LOG` asks for. An invalid value gives `None`, since the log that could
/// report it has not started yet.
fn wanted() -> Option<Targets> {
    std::env::var("CLONE_LOG").ok()?.parse().ok()
}

fn warnings() -> Targets {
    Targets::new().with_default(LevelFilter::WARN)
}
