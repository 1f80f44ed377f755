//! A local file that bytes from elsewhere are written into, as `cp` would.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A chain of links that is longer is a circle (path_resolution(7)).
const LINKS_MAX: usize = 40;

/// Where the bytes go. What there is already of another kind than a plain file, as a device or a
/// pipe, is written into; else the file appears whole, or not at all.
pub struct FileSink {
    file: File,
    /// Its temporary name and its final one, until it has that.
    part: Option<(PathBuf, PathBuf)>,
}

impl FileSink {
    /// Opens `target`; links are followed.
    pub fn open(target: &Path) -> io::Result<Self> {
        let target = end_of_links(target)?;
        let is_special = fs::metadata(&target).is_ok_and(|it| !it.is_file());
        if is_special || is_of_process(&target) {
            // A directory is refused here.
            let file = File::options().write(true).open(&target)?;
            return Ok(Self { file, part: None });
        }
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(format!(".part{}", std::process::id()));
        let part = target.with_file_name(name);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)?;
        Ok(Self {
            file,
            part: Some((part, target)),
        })
    }

    /// The open file, for questions about where it lies.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// All was written: gives a file its permissions and its name.
    pub fn keep(mut self, mode: u32) -> io::Result<()> {
        let Some((part, target)) = &self.part else {
            return Ok(());
        };
        self.file
            .set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(part, target)?;
        self.part = None;
        Ok(())
    }
}

impl Write for FileSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for FileSink {
    fn drop(&mut self) {
        if let Some((part, _)) = &self.part {
            // The first error is the one to report.
            let _ = fs::remove_file(part);
        }
    }
}

/// A process's open files, where `/dev/stdout` leads: nothing else can take their place.
fn is_of_process(path: &Path) -> bool {
    path.starts_with("/proc")
}

fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        match fs::read_link(&path) {
            Ok(target) if !is_of_process(&path) => {
                path = path.parent().unwrap_or(Path::new("/")).join(target);
            }
            _ => return Ok(path),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::{FileTypeExt, symlink};

    use super::*;

    fn write(target: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut sink = FileSink::open(target)?;
        sink.write_all(bytes)?;
        sink.keep(0o640)
    }

    #[test]
    fn a_pipe_and_a_device_are_written_into_and_stay() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || {
                let mut text = String::new();
                File::open(pipe).unwrap().read_to_string(&mut text).unwrap();
                text
            }
        });
        write(&pipe, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), "through");
        assert!(fs::metadata(&pipe).unwrap().file_type().is_fifo());
        write(Path::new("/dev/null"), b"x").unwrap();
        assert!(
            fs::metadata("/dev/null")
                .unwrap()
                .file_type()
                .is_char_device()
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write(folder.path(), b"x").is_err());
    }

    #[test]
    fn a_file_appears_whole_at_the_end_of_links_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        symlink("file", path("link")).unwrap();
        write(&path("link"), b"new").unwrap();
        assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
        assert_eq!(fs::read(path("file")).unwrap(), b"new");
        let mode = fs::metadata(path("file")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        let mut sink = FileSink::open(&path("file")).unwrap();
        sink.write_all(b"half").unwrap();
        drop(sink);
        assert_eq!(fs::read(path("file")).unwrap(), b"new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
