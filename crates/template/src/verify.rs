//! Verifies a template's content, once for each host and each change of its files.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use clone_start::error::{Result, failed};
use clone_start::fits;

use super::Template;

/// The size of the pieces that are hashed, in bytes. Pieces that are all zero are skipped, so holes
/// cost nothing.
const PIECE: usize = 64 << 10;
static ZEROS: [u8; PIECE] = [0; PIECE];
/// The number of threads that check memory layers.
const THREADS: usize = 2;

/// The hash of a file's content and length, 64 hexadecimal digits: BLAKE3 over its length, and
/// number and bytes of every piece of 64 KiB that is not all zero.
pub fn hash_of(file: &File) -> io::Result<String> {
    let len = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&len.to_le_bytes());
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        // Holes are all zero; on file systems without holes they are read.
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => at = data / PIECE as u64 * PIECE as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => {}
        }
        let part = (len - at).min(PIECE as u64) as usize;
        let piece = &mut buffer[..part];
        file.read_exact_at(piece, at)?;
        if piece != &ZEROS[..part] {
            hasher.update(&(at / PIECE as u64).to_le_bytes());
            hasher.update(piece);
        }
        at += part as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

impl Template {
    /// Reads and checks all files. `done` is called after each step with the number of bytes that
    /// were read.
    ///
    /// # Errors
    /// Names the first file that differs from the manifest.
    pub fn verify(&self, mut done: impl FnMut(u64)) -> Result<()> {
        for hashed in self.content().hashed() {
            let file = self.file(&hashed.file)?;
            let hash = hash_of(file).map_err(failed("read", &self.path(&hashed.file)))?;
            if hash != hashed.hash {
                let name = &hashed.file;
                let reason = format!("{name} is damaged: its hash is not the described one");
                return Err(self.refused(&reason));
            }
            done(hashed.bytes);
        }
        self.check_state()?;
        for index in 0..self.content().disks.len() {
            self.open_disk(index)?;
        }
        let stack = self.memory()?;
        for layer in stack.layers() {
            let verified = layer.verify(THREADS);
            verified
                .map_err(|error| self.refused(&format!("{} is damaged: {error}", layer.name())))?;
            done(layer.data().bytes());
        }
        Ok(())
    }

    /// Checks that the state is that of a machine of the described shape.
    fn check_state(&self) -> Result<()> {
        let fits = fits::check_fits(&self.state()?, &self.content().shape);
        fits.map_err(|reason| self.refused(&format!("{}: {reason}", self.content().state.file)))
    }

    /// The number of bytes that [`Template::verify`] reads.
    pub fn bytes_to_verify(&self) -> u64 {
        let content = self.content();
        let memory = content.memory.layers.iter().map(|layer| layer.data_bytes);
        content.hashed().map(|file| file.bytes).chain(memory).sum()
    }

    /// Verifies the template unless that was done on this host since its files were last touched.
    pub fn ensure_verified(&self, verified: &Verified) -> Result<()> {
        let path = verified.file(&self.manifest.id);
        let stamp = self.stamp()?;
        match fs::read_to_string(&path) {
            Ok(known) if known == stamp => return Ok(()),
            // The files are unchanged, so the record is updated with the new link counts and times.
            Ok(known) if is_only_linked(&known, &stamp) => {
                return self.note_verified(verified, &stamp);
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("read", &path)(error)),
        }
        self.verify_and_note(verified, |_| {})
    }

    /// Verifies the template in any case, and records the result, so that a damaged template is not
    /// forked even if no file's time shows the damage.
    ///
    /// # Errors
    /// As [`Template::verify`].
    pub fn verify_and_note(&self, verified: &Verified, done: impl FnMut(u64)) -> Result<()> {
        // The stamp is taken before, so that a change during the verification is detected the next
        // time.
        let stamp = self.stamp()?;
        match self.verify(done) {
            Ok(()) => self.note_verified(verified, &stamp),
            Err(error) => {
                verified.forget(&self.manifest.id)?;
                Err(error)
            }
        }
    }

    /// Records that the files match the manifest, since they have just been written or verified.
    pub(super) fn note_verified(&self, verified: &Verified, stamp: &str) -> Result<()> {
        let path = verified.file(&self.manifest.id);
        // Only the owner can write to the directory, and an incomplete stamp matches nothing.
        fs::write(&path, stamp).map_err(failed("write", &path))
    }

    /// A stamp that shows whether a file was touched: the identity and size of each file, and the
    /// times of the last change of its content and its inode. No program can set the latter.
    pub(super) fn stamp(&self) -> Result<String> {
        let mut stamp = String::new();
        for name in self.content().files() {
            let meta = self.file(name)?.metadata();
            stamp += &stamp_of(&meta.map_err(failed("look at", &self.path(name)))?);
        }
        Ok(stamp)
    }
}

/// The record of which templates were verified on this host, and with which files: a small file for
/// each template, in a directory that only its owner can write to.
#[derive(Debug, Clone)]
pub struct Verified {
    dir: PathBuf,
}

impl Verified {
    /// Uses the records in `dir`.
    pub fn in_dir(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The record of the template with this id.
    pub fn file(&self, id: &str) -> PathBuf {
        self.dir.join(format!(".verified-{id}"))
    }

    /// Removes the record that the template with this id was verified.
    pub fn forget(&self, id: &str) -> Result<()> {
        let path = self.file(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// The separator in a stamp between the fields that show a change of the content and those that a
/// new link changes as well.
const LINKS: &str = " links ";

fn stamp_of(meta: &Metadata) -> String {
    format!(
        "{} {} {} {}.{}{LINKS}{} {}.{}\n",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.nlink(),
        meta.ctime(),
        meta.ctime_nsec()
    )
}

/// Whether the only change is that files got or lost hard links. Another template that shares a
/// layer changes the layer's ctime, but not its content.
fn is_only_linked(known: &str, now: &str) -> bool {
    let same = |(known, now): (&str, &str)| {
        let (Some(known), Some(now)) = (known.split_once(LINKS), now.split_once(LINKS)) else {
            return false;
        };
        let links = |text: &str| text.split_once(' ').map(|(links, _)| links.to_owned());
        known.0 == now.0 && (known.1 == now.1 || links(known.1) != links(now.1))
    };
    known.ends_with('\n')
        && known.lines().count() == now.lines().count()
        && known.lines().zip(now.lines()).all(same)
}
