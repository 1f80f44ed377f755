//! The agent's own limits: more open files than its commands have, and protection from the OOM
//! killer.
//!
//! Commands inherit neither. If a command were protected, the kernel would kill another process
//! instead.

use std::fs;
use std::io;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// The limits that the agent was started with.
struct Inherited {
    open_files: Option<Rlimit>,
    is_spared: bool,
}

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Raises the limits as far as the guest allows. Every command has several open files, and the
/// usual limit is meant for one program.
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

/// Restores the original limits in a child before it runs its program. It is async-signal-safe,
/// since it makes only system calls.
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
