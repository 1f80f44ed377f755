//! The store: the directory in which templates are found by name.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clone_api::{ApiError, ErrorCode};
use clone_start::error::{Result, failed};
use rustix::fs::FlockOperation;

use super::{Template, build, folder, names, no_template};

/// The size limit of a file that names a holder: that of paths, in bytes.
const MAX_HOLDER: u64 = 4096;

/// The directory of the templates that are given by name.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store that the environment names: `$CLONE_TEMPLATE_DIR`, else `/var/lib/clone/templates`
    /// for root and `$XDG_DATA_HOME/clone/templates` (or below `~/.local/share`) for others.
    pub fn from_env() -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let root = if let Some(root) = set("CLONE_TEMPLATE_DIR") {
            PathBuf::from(root)
        } else if rustix::process::geteuid().is_root() {
            PathBuf::from("/var/lib/clone/templates")
        } else if let Some(data) = set("XDG_DATA_HOME") {
            Path::new(&data).join("clone/templates")
        } else if let Some(home) = set("HOME") {
            Path::new(&home).join(".local/share/clone/templates")
        } else {
            return Err(ApiError::new(
                ErrorCode::HostUnsupported,
                "there is no place for templates: HOME is not set",
            )
            .advise("set CLONE_TEMPLATE_DIR to a directory of yours"));
        };
        // The path comes from the caller's environment, so links in it are followed; links below it
        // are not.
        let root = folder::resolved(&root).map_err(failed("find", &root))?;
        Ok(Self { root })
    }

    /// Makes a store at `root`, a path without links.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The path of the template `name`, which need not exist: in the store, or anywhere if `name`
    /// contains a `/`.
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        if name.contains('/') {
            return std::path::absolute(name).map_err(failed("find", Path::new(name)));
        }
        if !clone_api::validate::is_valid_name(name) {
            return Err(ApiError::new(
                ErrorCode::InvalidConfig,
                format!("invalid template name `{}`", name.escape_debug()),
            )
            .advise("use letters, digits, `-`, `_` and `.`, or a path with a `/`"));
        }
        Ok(self.root.join(name))
    }

    /// Opens the template `name`.
    pub fn open(&self, name: &str) -> Result<Template> {
        Template::open(&self.path(name)?)
    }

    /// The names in the store, each with its template or the error of opening it.
    pub fn list(&self) -> Result<Vec<(String, Result<Template>)>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed("list", &self.root))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("list", &self.root))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') && entry.path().join(names::MANIFEST).exists() {
                found.push((name, Template::open(&entry.path())));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Removes a template that is not in use.
    ///
    /// # Errors
    /// [`ErrorCode::Conflict`] while it is in use.
    pub fn remove(&self, name: &str) -> Result<()> {
        let dir = self.path(name)?;
        let path = dir.join(names::MANIFEST);
        let file = open_plain(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => no_template(&dir),
            _ => failed("open", &path)(error),
        })?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            ApiError::new(
                ErrorCode::Conflict,
                format!("the template {} is in use", dir.display()),
            )
            .advise(
                "end the VMs that were forked from it (`clone ls`), and its `clone template serve`",
            )
        })?;
        if let Some(holder) = holder(&dir)? {
            let message = format!(
                "the template {} is in use by the suspended VM in {}",
                dir.display(),
                holder.display()
            );
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("remove that VM, or resume and end it (`clone ls`)"));
        }
        if let Some(name) = foreign_entry(&dir)? {
            let message = format!(
                "{} holds `{name}`, which is no part of a template",
                dir.display()
            );
            return Err(ApiError::new(ErrorCode::Conflict, message)
                .advise("move it away, or remove the directory yourself if it is to go"));
        }
        // A directory with a hidden name is not a template, whatever happens next.
        let hidden = build::hidden_name(&dir)?;
        fs::rename(&dir, &hidden).map_err(failed("remove", &dir))?;
        build::remove_all(&hidden)
    }
}

/// A directory that exists and builds on the template in `dir`.
fn holder(dir: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let entry = entry.map_err(failed("list", dir))?;
        if !entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(names::HELD.as_bytes())
        {
            continue;
        }
        let mut holder = Vec::new();
        let read = open_plain(&entry.path())
            .and_then(|file| file.take(MAX_HOLDER).read_to_end(&mut holder));
        read.map_err(failed("read", &entry.path()))?;
        let holder = PathBuf::from(OsString::from_vec(holder));
        if holder.is_absolute() && holder.exists() {
            return Ok(Some(holder));
        }
    }
    Ok(None)
}

/// Opens the manifest of a template that is to be removed. It may be damaged, and may belong to any
/// user.
fn open_plain(path: &Path) -> io::Result<fs::File> {
    fs::File::options()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// The name of a file that is not part of any template. A directory with one may belong to another
/// program that also uses a `manifest.json`. A damaged template has only its own files.
fn foreign_entry(dir: &Path) -> Result<Option<String>> {
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let entry = entry.map_err(failed("list", dir))?;
        let is_dir = entry.file_type().map_err(failed("look at", dir))?.is_dir();
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_dir || !names::is_file_of_a_template(&name) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}
