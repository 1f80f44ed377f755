//! What the agent is allowed beyond its commands: more open files, and being spared when memory is short.
//!
//! Commands inherit neither. A command that the kernel spares would make it kill something else in its place.

use std::fs;
use std::io;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// What the agent was started with.
struct Inherited {
    open_files: Option<Rlimit>,
    is_spared: bool,
}

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Takes what the guest gives. Every command has several open files, and the usual limit is for one
/// program.
pub(crate) fn raise() {
    INHERITED.get_or_init(|| {
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        };
        let open_files = setrlimit(Resource::Nofile, raised).is_ok().then_some(limit);
        let is_spared = fs::write(OOM_SCORE, "-900").is_ok()
            || fs::read_to_string(OOM_SCORE).is_ok_and(|score| score.starts_with('-'));
        Inherited {
            open_files,
            is_spared,
        }
    });
}

/// Gives it back, in a child before its program. Async-signal-safe: system calls only.
pub(crate) fn restore() -> io::Result<()> {
    let Some(inherited) = INHERITED.get() else {
        return Ok(());
    };
    if let Some(limit) = inherited.open_files {
        setrlimit(Resource::Nofile, limit)?;
    }
    if inherited.is_spared {
        let file = rustix::fs::open(
            c"/proc/self/oom_score_adj",
            OFlags::WRONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        rustix::io::write(file, b"0")?;
    }
    Ok(())
}
