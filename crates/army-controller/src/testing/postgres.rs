//! A PostgreSQL server of a test's or a measurement's own, from this machine's package.

use std::io::{Error, Result};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where Debian's packages are, one folder for each version.
const PACKAGES: &str = "/usr/lib/postgresql";
/// The user and group without rights.
const NOBODY: u32 = 65534;
/// How long the server may take to start.
const STARTED: Duration = Duration::from_secs(60);

/// The number of servers that this process has started.
static STARTS: AtomicU32 = AtomicU32::new(0);

/// A server without a network, which ends, and whose data are removed, when this is dropped.
pub struct Postgres {
    /// Where its data and its socket are.
    folder: PathBuf,
    programs: PathBuf,
    server: Child,
}

impl Postgres {
    /// Starts a server with these options of `postgres`, with its data in a new folder in `parent`, whose
    /// path should be short, because that of a socket is limited. Returns `None` where the package is
    /// not installed.
    ///
    /// # Errors
    /// Where the server cannot be started.
    pub fn start(parent: &Path, options: &[&str]) -> Result<Option<Self>> {
        let Ok(versions) = std::fs::read_dir(PACKAGES) else {
            return Ok(None);
        };
        let versions: Result<Vec<PathBuf>> = versions.map(|it| Ok(it?.path())).collect();
        let Some(programs) = versions?.into_iter().max().map(|it| it.join("bin")) else {
            return Ok(None);
        };
        let number = STARTS.fetch_add(1, Ordering::Relaxed);
        let folder = parent.join(format!("army-postgres-{}-{number}", std::process::id()));
        std::fs::create_dir(&folder)?;
        if is_root()? {
            chown(&folder, Some(NOBODY), Some(NOBODY))?;
        }
        let log = folder.join("log");
        let made = program(&programs.join("initdb"), &folder)?
            .args(["-U", "army", "-A", "trust", "-N", "-E", "UTF8"])
            .arg("--locale=C")
            .status()?;
        if !made.success() {
            return Err(Error::other(format!("initdb failed: {}", log.display())));
        }
        let server = program(&programs.join("postgres"), &folder)?
            .arg("-k")
            .arg(&folder)
            .args(["-c", "listen_addresses="])
            .args(options)
            .spawn()?;
        Ok(Some(Self {
            folder,
            programs,
            server,
        }))
    }

    /// The id of the server's first process, whose children are all others.
    pub fn process_id(&self) -> u32 {
        self.server.id()
    }

    /// The URL of a database. The one named `postgres` exists.
    pub fn url(&self, database: &str) -> String {
        let folder = self.folder.display();
        format!("postgres://army@localhost/{database}?host={folder}")
    }

    /// Creates an empty database, as soon as the server has started, and returns its URL.
    ///
    /// # Errors
    /// Where that does not succeed within a minute.
    pub fn create_database(&self, name: &str) -> Result<String> {
        let end = Instant::now() + STARTED;
        loop {
            let made = Command::new(self.programs.join("createdb"))
                .arg("-h")
                .arg(&self.folder)
                .args(["-U", "army", name])
                .stderr(Stdio::null())
                .status()?;
            if made.success() {
                return Ok(self.url(name));
            }
            if Instant::now() > end {
                return Err(Error::other(format!("cannot create the database {name}")));
            }
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

/// A program of the server over the data in `folder`. As root it runs as nobody, because it refuses to
/// be root.
fn program(path: &Path, folder: &Path) -> Result<Command> {
    let mut log = std::fs::OpenOptions::new();
    let log = log.create(true).append(true).open(folder.join("log"))?;
    let mut command = Command::new(path);
    command
        .arg("-D")
        .arg(folder.join("data"))
        .stdout(Stdio::null())
        .stderr(log);
    if is_root()? {
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
    }
    Ok(command)
}

fn is_root() -> Result<bool> {
    Ok(std::fs::metadata("/proc/self")?.uid() == 0)
}
