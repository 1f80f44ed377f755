//! A PostgreSQL of this machine's package, which is started for the bench.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// The user and group without rights.
const NOBODY: u32 = 65534;
/// How long the server may take to start.
const STARTED: Duration = Duration::from_secs(60);

pub(super) struct Postgres {
    /// Where its data and its socket are.
    folder: PathBuf,
    programs: PathBuf,
    server: Child,
}

/// A PostgreSQL, where its package is installed.
pub(super) fn find(state: &Path) -> Result<Option<Postgres>> {
    let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") else {
        return Ok(None);
    };
    let versions: std::io::Result<Vec<_>> = versions.map(|it| Ok(it?.path())).collect();
    match versions?.into_iter().max() {
        Some(version) => start(&version.join("bin"), state).map(Some),
        None => Ok(None),
    }
}

fn start(programs: &Path, state: &Path) -> Result<Postgres> {
    // Sockets have short names, and the server's user must be able to reach its files.
    let folder = std::env::temp_dir().join(format!("fleet-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(&folder, Some(NOBODY), Some(NOBODY))?;
    }
    let log = std::fs::File::create(state.join("postgres.log"))?;
    let program = |name: &str| -> Result<Command> {
        let mut command = Command::new(programs.join(name));
        command
            .arg("-D")
            .arg(folder.join("data"))
            .stdout(Stdio::null())
            .stderr(log.try_clone()?);
        if is_root {
            // It refuses to be root.
            command.uid(NOBODY).gid(NOBODY).current_dir("/");
        }
        Ok(command)
    };
    let made = program("initdb")?
        .args([
            "-U",
            "army",
            "-A",
            "trust",
            "-N",
            "-E",
            "UTF8",
            "--locale=C",
        ])
        .status()?;
    anyhow::ensure!(
        made.success(),
        "initdb failed: {}",
        state.join("postgres.log").display()
    );
    let server = program("postgres")?
        .arg("-k")
        .arg(&folder)
        .args(["-c", "listen_addresses=", "-c", "shared_buffers=512MB"])
        .spawn()
        .context("cannot start postgres")?;
    Ok(Postgres {
        folder,
        programs: programs.to_owned(),
        server,
    })
}

impl Postgres {
    /// The URL of an empty database, a new one for each number.
    pub(super) fn database(&self, number: usize) -> Result<String> {
        let name = format!("fleet{number}");
        let end = Instant::now() + STARTED;
        loop {
            let made = Command::new(self.programs.join("createdb"))
                .arg("-h")
                .arg(&self.folder)
                .args(["-U", "army", &name])
                .stderr(Stdio::null())
                .status()?;
            if made.success() {
                return Ok(format!(
                    "postgres://army@localhost/{name}?host={}",
                    self.folder.display()
                ));
            }
            anyhow::ensure!(Instant::now() < end, "cannot create a database");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.server.kill().and_then(|()| self.server.wait());
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
