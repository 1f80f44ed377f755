//! Debian suites: runs mmdebstrap and merges the tar stream that it writes. apt checks the archive's signatures.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::debug;

use super::layer::LayerMerge;
use crate::progress::{Progress, Step};
use crate::tree::{Spool, Tree};
use crate::{ImageError, Result};

/// How long a failing mmdebstrap may take to end with an error of its own.
const MOMENT: Duration = Duration::from_secs(3);
/// As many last lines of mmdebstrap's log go into an error.
const LOG_LINES: usize = 12;

/// A Debian system to install.
#[derive(Clone, Debug)]
pub struct Debian {
    /// Its suite: `trixie`, `stable`.
    pub suite: String,
    /// mmdebstrap's variant; `minbase` is what every Debian system has.
    pub variant: String,
    /// Packages beyond the variant's.
    pub packages: Vec<String>,
    /// A mirror's URL or a line of `sources.list`; mmdebstrap's own choice if not given.
    pub mirror: Option<String>,
}

impl Debian {
    /// A small system with systemd, networking tools and a login: what a guest needs and no more.
    pub fn new(suite: impl Into<String>) -> Self {
        let packages = [
            "systemd-sysv",
            "udev",
            "dbus",
            "kmod",
            "iproute2",
            "login",
            "netbase",
            "procps",
        ];
        Self {
            suite: suite.into(),
            variant: "minbase".to_owned(),
            packages: packages.map(str::to_owned).to_vec(),
            mirror: None,
        }
    }

    /// Refuses what mmdebstrap would take for an option, a list or a script.
    fn check(&self) -> Result<()> {
        let plain = |text: &str| {
            let mut bytes = text.bytes();
            bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
                && bytes.all(|b| b.is_ascii_alphanumeric() || b"-.+~:/=_".contains(&b))
        };
        let names = [&self.suite, &self.variant]
            .into_iter()
            .chain(&self.packages);
        if let Some(bad) = names.into_iter().find(|name| !plain(name)) {
            return Err(ImageError::Unsupported {
                what: format!("{bad:?} cannot name a Debian suite, variant or package"),
                advice: "use names such as trixie, minbase or openssh-server".to_owned(),
            });
        }
        match &self.mirror {
            Some(mirror) if mirror.starts_with('-') || mirror.chars().any(char::is_control) => {
                Err(ImageError::Unsupported {
                    what: format!("{mirror:?} is no mirror"),
                    advice: "give a URL that begins with http:// or https://".to_owned(),
                })
            }
            _ => Ok(()),
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .arg(format!("--variant={}", self.variant))
            .arg("--format=tar");
        if !self.packages.is_empty() {
            command.arg(format!("--include={}", self.packages.join(",")));
        }
        command.arg(&self.suite).arg("-").args(&self.mirror);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }
}

/// A running mmdebstrap. Dropped early, it is asked to end, which lets it remove its own temporary directory.
struct Running {
    child: Child,
    log: Option<JoinHandle<VecDeque<String>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            // Its pipe is closed and it has the signal: it ends soon.
            drop(self.child.stdout.take());
            let _ = self.child.wait();
        }
    }
}

impl Running {
    fn start(debian: &Debian, program: &Path) -> Result<Self> {
        let mut child = debian
            .command(program)
            .spawn()
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => ImageError::Program {
                    program: "mmdebstrap",
                    status: "not found".to_owned(),
                    detail: "install the package mmdebstrap, or build from a container image"
                        .to_owned(),
                },
                _ => ImageError::io("start", "mmdebstrap")(e),
            })?;
        let log = child.stderr.take().map(|stderr| {
            std::thread::spawn(move || {
                let mut last = VecDeque::new();
                for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    debug!(target: "mmdebstrap", "{line}");
                    last.push_back(line);
                    if last.len() > LOG_LINES {
                        last.pop_front();
                    }
                }
                last
            })
        });
        Ok(Self { child, log })
    }

    /// Its own error, if it ends with one by itself within a moment; else it is ended.
    fn failed_by_itself(self) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed());
        let flags = rustix::process::PidfdFlags::empty();
        let fd = pid.and_then(|pid| rustix::process::pidfd_open(pid, flags).ok());
        let Some(fd) = fd else { return Ok(()) };
        match clone_base::wait::readable(&fd, Some(MOMENT)) {
            Ok(true) => self.finish(),
            _ => Ok(()),
        }
    }

    /// Waits for its end; an error if that was not a success.
    fn finish(mut self) -> Result<()> {
        let status = self
            .child
            .wait()
            .map_err(ImageError::io("wait for", "mmdebstrap"))?;
        let log = self
            .log
            .take()
            .and_then(|log| log.join().ok())
            .unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        let lines: Vec<String> = log.into();
        Err(ImageError::Program {
            program: "mmdebstrap",
            status: status.to_string(),
            detail: lines.join("\n"),
        })
    }
}

struct Counted<'a, R> {
    inner: R,
    progress: &'a dyn Progress,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.progress.advance(n as u64);
        Ok(n)
    }
}

/// Installs a Debian system into a tree.
pub(crate) fn install(
    debian: &Debian,
    tree: &mut Tree,
    spool: &mut Spool,
    progress: &dyn Progress,
) -> Result<()> {
    install_by(Path::new("mmdebstrap"), debian, tree, spool, progress)
}

fn install_by(
    program: &Path,
    debian: &Debian,
    tree: &mut Tree,
    spool: &mut Spool,
    progress: &dyn Progress,
) -> Result<()> {
    debian.check()?;
    progress.begin(
        Step::Debootstrap {
            suite: debian.suite.clone(),
        },
        None,
    );
    let mut running = Running::start(debian, program)?;
    let Some(stdout) = running.child.stdout.take() else {
        return Err(ImageError::malformed(
            "mmdebstrap's output",
            "there is none",
        ));
    };
    let stream = BufReader::with_capacity(
        1 << 18,
        Counted {
            inner: stdout,
            progress,
        },
    );
    let merged = LayerMerge::new(tree, spool, "mmdebstrap's output").merge(stream);
    match merged {
        // A stream cut short is the result of a failure that mmdebstrap explains better.
        Ok(()) => running.finish(),
        Err(ImageError::Malformed { .. }) => running.failed_by_itself().and(merged),
        Err(other) => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use crate::source::testing::Layer;
    use crate::tree::Limits;

    /// Runs a script in mmdebstrap's place; it finds a tar of `/etc/debian_version` at `$0.tar`.
    fn run(script: &str) -> (Result<()>, Tree) {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("mmdebstrap");
        fs::write(
            dir.path().join("mmdebstrap.tar"),
            Layer::new().file("./etc/debian_version", b"13").tar(),
        )
        .unwrap();
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut tree = Tree::new(Limits::default());
        let mut spool = Spool::new(dir.path(), 1 << 30).unwrap();
        let result = install_by(&program, &Debian::new("trixie"), &mut tree, &mut spool, &());
        (result, tree)
    }

    #[test]
    fn the_installed_system_becomes_the_tree() {
        let (result, tree) = run(
            "case \"$*\" in *--variant=minbase*--include=systemd-sysv,*' trixie -') cat $0.tar ;; esac",
        );
        result.unwrap();
        assert!(tree.find("/etc/debian_version").is_some());
    }

    #[test]
    fn a_failed_install_says_why() {
        for script in [
            "echo 'E: no such suite' >&2; exit 100",
            "head -c 700 $0.tar; echo 'E: no such suite' >&2; exit 100",
        ] {
            let error = run(script).0.unwrap_err().to_string();
            assert!(
                error.contains("no such suite") && error.contains("100"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_stream_that_is_refused_ends_the_program() {
        // It would run for an hour; a signal ends it, and the build does not wait.
        let begun = std::time::Instant::now();
        let error = run("head -c 512 $0.tar; exec sleep 3600 >&-")
            .0
            .unwrap_err();
        assert!(begun.elapsed().as_secs() < 60, "{error}");
    }

    #[test]
    fn a_missing_program_is_named_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let mut tree = Tree::new(Limits::default());
        let mut spool = Spool::new(dir.path(), 1 << 30).unwrap();
        let program = dir.path().join("none");
        let error =
            install_by(&program, &Debian::new("trixie"), &mut tree, &mut spool, &()).unwrap_err();
        assert!(
            error.to_string().contains("install the package mmdebstrap"),
            "{error}"
        );
    }

    #[test]
    fn words_that_are_options_or_lists_are_refused() {
        let with = |change: fn(&mut Debian)| {
            let mut debian = Debian::new("trixie");
            change(&mut debian);
            debian.check()
        };
        assert!(with(|_| {}).is_ok());
        assert!(with(|d| d.packages.push("libstdc++6:amd64".to_owned())).is_ok());
        assert!(with(|d| d.suite = "--setup-hook=id".to_owned()).is_err());
        assert!(with(|d| d.packages.push("a,b".to_owned())).is_err());
        assert!(with(|d| d.packages.push("?essential".to_owned())).is_err());
        assert!(with(|d| d.mirror = Some("--hook-dir=/x".to_owned())).is_err());
        assert!(with(|d| d.variant = String::new()).is_err());
    }
}
