//! Taking a template to another host: all of it as one stream of bytes.
//!
//! The stream is [`MAGIC`], the version, then pieces: the length of a file's name (one byte), the
//! name, where in the file the piece lies and how long it is (each eight bytes, little-endian), its
//! bytes. A piece without bytes says how long the file is. An empty name ends the stream. The
//! manifest comes first, so that nothing is taken that it does not name. Holes are not sent.
//!
//! Whoever receives asks for an id, which is a hash over all content, and verifies it: the sender
//! need not be trusted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use clone_api::{ApiError, ErrorCode};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::manifest::{self, Manifest, refused};
use super::{NewTemplate, Template, open_plain};
use crate::error::{Result, failed};
use crate::runtime::Runtime;

/// What a stream begins with.
const MAGIC: &[u8; 8] = b"CLONETPL";
/// The version of the stream.
const VERSION: u8 = 1;
/// Bytes of a file in one piece, at most.
const PIECE: u64 = 1 << 20;
/// Where a file may end: more is nobody's disk.
const MAX_FILE: u64 = 1 << 44;

/// Writes all of `template` to `sink`.
pub fn send(template: &Template, sink: &mut impl Write) -> Result<()> {
    let gone = |error: io::Error| {
        let message = format!("cannot send the template: {error}");
        ApiError::new(ErrorCode::Unavailable, message)
    };
    sink.write_all(MAGIC).map_err(gone)?;
    sink.write_all(&[VERSION]).map_err(gone)?;
    for name in [manifest::FILE]
        .into_iter()
        .chain(template.content().files())
    {
        let path = template.path(name);
        let file = open_plain(&path).map_err(failed("open", &path))?;
        let len = file.metadata().map_err(failed("look at", &path))?.len();
        let mut data = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = next_data(&file, at).map_err(failed("read", &path))? {
            at = start;
            while at < end {
                data.resize((end - at).min(PIECE) as usize, 0);
                file.read_exact_at(&mut data, at)
                    .map_err(failed("read", &path))?;
                piece(sink, name, at, &data).map_err(gone)?;
                at += data.len() as u64;
            }
        }
        piece(sink, name, len, &[]).map_err(gone)?;
    }
    sink.write_all(&[0])
        .and_then(|()| sink.flush())
        .map_err(gone)
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

/// Reads a template from `source`, verifies it, and gives it its place at `target`; with `id` only
/// if it is that one.
///
/// # Errors
/// With what is wrong with the stream; then nothing is left of it.
pub fn receive(
    target: &Path,
    id: Option<&str>,
    source: &mut impl Read,
    runtime: &Runtime,
) -> Result<Template> {
    let broken = |error: io::Error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return refused(target, "it ends early");
        }
        let message = format!("the template did not come whole: {error}");
        ApiError::new(ErrorCode::Unavailable, message)
    };
    let wrong = |reason: &str| refused(target, reason);
    let mut head = [0; MAGIC.len() + 1];
    source.read_exact(&mut head).map_err(broken)?;
    if &head[..MAGIC.len()] != MAGIC || head[MAGIC.len()] != VERSION {
        return Err(wrong("what came is no template, or of another version"));
    }
    let new = NewTemplate::begin(target)?;
    let mut text = Vec::new();
    let mut expected: Option<Manifest> = None;
    let mut current: Option<(String, File)> = None;
    let mut data = Vec::new();
    while let Some((name, at, len)) = read_head(source).map_err(broken)? {
        if len > PIECE || at > MAX_FILE {
            return Err(wrong("a piece is too large"));
        }
        data.resize(len as usize, 0);
        source.read_exact(&mut data).map_err(broken)?;
        if name == manifest::FILE {
            if expected.is_some() || at + len > manifest::MAX_BYTES {
                return Err(wrong("its manifest is too large, or comes twice"));
            }
            if len > 0 {
                text.extend_from_slice(&data);
                continue;
            }
            let manifest = Manifest::parse(&text, target)?;
            if let Some(id) = id.filter(|id| manifest.id != *id) {
                let reason = format!("it is the template {}, and not {id}", manifest.id);
                return Err(wrong(&reason));
            }
            expected = Some(manifest);
            continue;
        }
        if current.as_ref().is_none_or(|(open, _)| *open != name) {
            let named = expected
                .as_ref()
                .is_some_and(|it| it.content.files().any(|file| file == name));
            if !named || !super::build::is_file_of_a_template(&name) {
                return Err(wrong("a file came that its manifest does not name"));
            }
            let file = new.create(&name)?;
            current = Some((name.clone(), file));
        }
        if let Some((name, file)) = &current {
            let put = match len {
                0 => file.set_len(at),
                _ => file.write_all_at(&data, at),
            };
            put.map_err(failed("write", Path::new(name)))?;
        }
    }
    match expected {
        Some(manifest) => new.take_in(&text, &manifest, runtime),
        None => Err(wrong("it came without a manifest")),
    }
}

/// The head of the next piece; `None` at the stream's end.
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
    use super::super::tests::Place;
    use super::*;

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
                receive(&target, Some(id), &mut bytes.as_slice(), &there.runtime).unwrap();
            assert_eq!(arrived.manifest().id, *id);
            for (ours, theirs) in template.memory_paths().iter().zip(arrived.memory_paths()) {
                assert_eq!(std::fs::read(ours).unwrap(), std::fs::read(theirs).unwrap());
            }
            arrived.ensure_verified(&there.runtime).unwrap();
        }
    }

    #[test]
    fn what_is_cut_short_changed_or_another_leaves_nothing() {
        let (here, there) = (Place::new(), Place::new());
        let template = here.make("a", None);
        let (id, bytes) = (template.manifest().id.clone(), sent(&template));
        let target = there.path("a");
        let refuse = |id: &str, bytes: &[u8]| {
            receive(&target, Some(id), &mut &bytes[..], &there.runtime).unwrap_err();
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
        receive(&target, None, &mut bytes.as_slice(), &there.runtime).unwrap();
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
                &there.runtime,
            );
            assert!(refused.unwrap_err().message.contains("does not name"));
        }
    }
}
