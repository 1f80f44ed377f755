//! Transfers a template to another host as one stream of bytes.
//!
//! The stream consists of [`MAGIC`], the version, and pieces. Each piece has the length of a file's
//! name (one byte), the name, the piece's offset in the file and its length (each eight bytes,
//! little-endian), and its bytes. A piece without bytes ends its file, and its offset is the file's
//! length. An empty name ends the stream. The manifest comes first and without holes, then each
//! file that it names, once and in its order, with ascending offsets. Holes of files are not sent.
//!
//! The receiver requests an id, which is a hash over all content, and verifies it, so the sender
//! need not be trusted. The manifest bounds what the receiver accepts: no piece goes beyond the
//! size that it gives for the file, and no byte is accepted twice.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use clone_api::{ApiError, ErrorCode};
use clone_start::error::{Result, failed};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::manifest::{self, Manifest};
use super::names::{self, refused};
use super::{NewTemplate, Template};
use crate::Verified;

/// The first bytes of a stream.
const MAGIC: &[u8; 8] = b"CLONETPL";
/// The version of the stream.
const VERSION: u8 = 1;
/// The most bytes of a file in one piece.
const PIECE: u64 = 1 << 20;
/// Writes all of `template` to `sink`.
///
/// # Errors
/// The template is of an older format, which does not bound its files, or cannot be read or
/// written.
pub fn send(template: &Template, sink: &mut impl Write) -> Result<()> {
    let manifest = template.manifest();
    manifest.check_current(template.dir(), "be sent to another host")?;
    let send_failed = |error: io::Error| {
        let message = format!("cannot send the template: {error}");
        ApiError::new(ErrorCode::Unavailable, message)
    };
    sink.write_all(MAGIC).map_err(send_failed)?;
    sink.write_all(&[VERSION]).map_err(send_failed)?;
    for name in [names::MANIFEST]
        .into_iter()
        .chain(template.content().files())
    {
        let path = template.path(name);
        let file = match name {
            names::MANIFEST => &template.lock,
            _ => template.file(name)?,
        };
        let len = file.metadata().map_err(failed("look at", &path))?.len();
        let mut data = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = next_data(file, at).map_err(failed("read", &path))? {
            at = start;
            while at < end {
                data.resize((end - at).min(PIECE) as usize, 0);
                file.read_exact_at(&mut data, at)
                    .map_err(failed("read", &path))?;
                piece(sink, name, at, &data).map_err(send_failed)?;
                at += data.len() as u64;
            }
        }
        piece(sink, name, len, &[]).map_err(send_failed)?;
    }
    sink.write_all(&[0])
        .and_then(|()| sink.flush())
        .map_err(send_failed)
}

/// The data of a file at or after `at`.
fn next_data(file: &File, at: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        start => start?,
    };
    Ok(Some((
        start,
        rustix::fs::seek(file, SeekFrom::Hole(start))?,
    )))
}

fn piece(sink: &mut impl Write, name: &str, at: u64, data: &[u8]) -> io::Result<()> {
    let mut head = vec![name.len() as u8];
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(&at.to_le_bytes());
    head.extend_from_slice(&(data.len() as u64).to_le_bytes());
    sink.write_all(&head)?;
    sink.write_all(data)
}

/// Reads a template from `source`, verifies it, and stores it at `target`. With `id`, any other
/// template is refused.
///
/// # Errors
/// Says what is wrong with the stream; everything that was received is removed.
pub fn receive(
    target: &Path,
    id: Option<&str>,
    source: &mut impl Read,
    verified: &Verified,
) -> Result<Template> {
    let mut stream = Stream { target, source };
    stream.begin()?;
    let text = stream.manifest()?;
    let manifest = Manifest::parse(&text, target)?;
    manifest.check_current(target, "be received")?;
    if let Some(id) = id.filter(|id| manifest.id != *id) {
        let reason = format!("it is the template {}, and not {id}", manifest.id);
        return Err(refused(target, &reason));
    }
    let new = NewTemplate::begin(target)?;
    for (name, bytes) in manifest.content.sizes() {
        let file = new.create(name)?;
        stream.file(name, bytes.unwrap_or(0), &file)?;
    }
    stream.end()?;
    new.take_in(&text, &manifest, verified)
}

/// A stream from which a template is received. It is refused as soon as it differs from its
/// manifest. It can cause no more use of memory than one piece and a manifest, and no more use of
/// disk than the manifest's sizes.
struct Stream<'a, S> {
    target: &'a Path,
    source: &'a mut S,
}

/// A part of a file; the end of the file if it has no bytes.
struct Piece {
    at: u64,
    data: Vec<u8>,
}

impl<S: Read> Stream<'_, S> {
    fn begin(&mut self) -> Result<()> {
        let mut head = [0; MAGIC.len() + 1];
        let read = self.source.read_exact(&mut head);
        read.map_err(|error| self.broken(&error))?;
        match &head[..MAGIC.len()] == MAGIC && head[MAGIC.len()] == VERSION {
            true => Ok(()),
            false => Err(self.refused("the stream is not a template, or has an unknown version")),
        }
    }

    /// Receives the manifest's text, whose pieces must follow each other without gaps.
    fn manifest(&mut self) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        loop {
            let Piece { at, data } = self.piece(names::MANIFEST)?;
            if at != text.len() as u64 {
                return Err(self.refused("the pieces of its manifest do not follow each other"));
            }
            if data.is_empty() {
                return Ok(text);
            }
            if at + data.len() as u64 > manifest::MAX_BYTES {
                return Err(self.refused("its manifest is too large"));
            }
            text.extend_from_slice(&data);
        }
    }

    /// Receives the file `name` of `bytes` bytes.
    fn file(&mut self, name: &str, bytes: u64, file: &File) -> Result<()> {
        let mut end = 0;
        loop {
            let Piece { at, data } = self.piece(name)?;
            if data.is_empty() {
                return match at == bytes {
                    true => file.set_len(at).map_err(failed("write", Path::new(name))),
                    false => Err(self.refused(&format!("{name} ends at {at}, not at {bytes}"))),
                };
            }
            let next = at.saturating_add(data.len() as u64);
            if at < end || next > bytes {
                let reason = format!("a piece of {name} lies outside of what is left of it");
                return Err(self.refused(&reason));
            }
            let written = file.write_all_at(&data, at);
            written.map_err(failed("write", Path::new(name)))?;
            end = next;
        }
    }

    /// Receives the next piece, which must belong to the file `name`.
    fn piece(&mut self, name: &str) -> Result<Piece> {
        let head = read_head(self.source).map_err(|error| self.broken(&error))?;
        let Some((found, at, len)) = head else {
            return Err(self.refused(&format!("it ends without {name}")));
        };
        if found != name {
            let reason = format!("{found:?} came, where its manifest names {name} next");
            return Err(self.refused(&reason));
        }
        if len > PIECE {
            return Err(self.refused("a piece is too large"));
        }
        let mut data = vec![0; len as usize];
        let read = self.source.read_exact(&mut data);
        read.map_err(|error| self.broken(&error))?;
        Ok(Piece { at, data })
    }

    fn end(&mut self) -> Result<()> {
        match read_head(self.source).map_err(|error| self.broken(&error))? {
            None => Ok(()),
            Some((name, ..)) => {
                let reason = format!("{name:?} came, which its manifest does not name");
                Err(self.refused(&reason))
            }
        }
    }

    fn refused(&self, reason: &str) -> ApiError {
        refused(self.target, reason)
    }

    fn broken(&self, error: &io::Error) -> ApiError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return self.refused("it ends early");
        }
        let message = format!("the template did not come whole: {error}");
        ApiError::new(ErrorCode::Unavailable, message)
    }
}

/// Reads the head of the next piece; `None` at the stream's end.
fn read_head(source: &mut impl Read) -> io::Result<Option<(String, u64, u64)>> {
    let mut len = [0; 1];
    source.read_exact(&mut len)?;
    if len[0] == 0 {
        return Ok(None);
    }
    let mut name = vec![0; usize::from(len[0])];
    source.read_exact(&mut name)?;
    let name = String::from_utf8(name).map_err(io::Error::other)?;
    let mut number = || {
        let mut bytes = [0; 8];
        source.read_exact(&mut bytes)?;
        io::Result::Ok(u64::from_le_bytes(bytes))
    };
    Ok(Some((name, number()?, number()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Place, RAM};

    fn sent(template: &Template) -> Vec<u8> {
        let mut bytes = Vec::new();
        send(template, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_template_arrives_as_it_was() {
        let (here, there) = (Place::new(), Place::new());
        let base = here.make("base", None);
        for template in [here.make("diff", Some(&base)), base] {
            let id = &template.manifest().id;
            let target = there.path(id);
            let bytes = sent(&template);
            let arrived =
                receive(&target, Some(id), &mut bytes.as_slice(), &there.verified).unwrap();
            assert_eq!(arrived.manifest().id, *id);
            for name in template.content().files() {
                let content = |it: &Template| std::fs::read(it.path(name)).unwrap();
                assert_eq!(content(&template), content(&arrived));
            }
            arrived.ensure_verified(&there.verified).unwrap();
        }
    }

    #[test]
    fn what_is_cut_short_changed_or_another_leaves_nothing() {
        let (here, there) = (Place::new(), Place::new());
        let template = here.make("a", None);
        let (id, bytes) = (template.manifest().id.clone(), sent(&template));
        let target = there.path("a");
        let refuse = |id: &str, bytes: &[u8]| {
            receive(&target, Some(id), &mut &bytes[..], &there.verified).unwrap_err();
            let left = std::fs::read_dir(target.parent().unwrap());
            assert_eq!(left.map_or(0, Iterator::count), 0);
        };
        for len in (0..bytes.len()).step_by(997) {
            refuse(&id, &bytes[..len]);
        }
        refuse("another", &bytes);
        for at in (0..bytes.len()).step_by(1511) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            refuse(&id, &changed);
        }
        receive(&target, None, &mut bytes.as_slice(), &there.verified).unwrap();
    }

    #[test]
    fn a_file_that_the_manifest_does_not_name_is_not_made() {
        let (here, there) = (Place::new(), Place::new());
        let template = here.make("a", None);
        let id = template.manifest().id.clone();
        let mut bytes = sent(&template);
        bytes.pop();
        for name in ["../../evil", "memory-9.layer"] {
            let mut more = bytes.clone();
            piece(&mut more, name, 0, b"x").unwrap();
            more.push(0);
            let refused = receive(
                &there.path("a"),
                Some(&id),
                &mut more.as_slice(),
                &there.verified,
            );
            assert!(refused.unwrap_err().message.contains("does not name"));
        }
    }

    /// A stream of the same pieces without end, which counts how much is taken of it.
    struct Endless {
        head: Vec<u8>,
        turn: Vec<u8>,
        taken: usize,
    }

    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let at = self.taken;
            let rest = match at.checked_sub(self.head.len()) {
                None => &self.head[at..],
                Some(at) => &self.turn[at % self.turn.len()..],
            };
            let count = rest.len().min(buffer.len());
            buffer[..count].copy_from_slice(&rest[..count]);
            self.taken += count;
            Ok(count)
        }
    }

    /// The number of bytes that are read of a stream that repeats `turn` forever after `head`.
    fn taken_of(head: &[u8], turn: &[u8]) -> usize {
        let there = Place::new();
        let mut source = Endless {
            head: [&MAGIC[..], &[VERSION], head].concat(),
            turn: turn.to_vec(),
            taken: 0,
        };
        receive(&there.path("a"), None, &mut source, &there.verified).unwrap_err();
        source.taken
    }

    fn one_piece(name: &str, at: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        piece(&mut bytes, name, at, data).unwrap();
        bytes
    }

    #[test]
    fn pieces_that_do_not_go_forward_end_the_stream() {
        let megabyte = vec![b' '; PIECE as usize];
        let manifest = |at, data: &[u8]| one_piece(names::MANIFEST, at, data);
        let few = 4 * PIECE as usize;
        assert!(taken_of(&[], &manifest(0, &megabyte)) < few);
        assert!(taken_of(&[], &manifest(0, b" ")) < few);
        assert!(taken_of(&[], &manifest(u64::MAX, &megabyte)) < few);
        // The same holds for a file's pieces after a valid manifest.
        let here = Place::new();
        let template = here.make("a", None);
        let text = std::fs::read(template.path(names::MANIFEST)).unwrap();
        let end = manifest(text.len() as u64, &[]);
        let head = [manifest(0, &text), end].concat();
        let layer = |at, data: &[u8]| one_piece("memory-0.layer", at, data);
        for turn in [
            layer(0, &megabyte),
            layer(u64::MAX, b"x"),
            layer(1 << 40, b"x"),
            layer(0, &[]),
            one_piece("state", 0, b"x"),
        ] {
            assert!(taken_of(&head, &turn) < head.len() + few);
        }
        // Growing for ever is no way either.
        let growing: Vec<u8> = (0..64)
            .flat_map(|at| layer(at * PIECE, &megabyte))
            .collect();
        assert!(taken_of(&head, &growing) < head.len() + RAM as usize + few);
    }
}
