//! Writes a tree as a cpio archive of the `newc` form, which Linux unpacks as its first root.
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`)

use std::io::{self, Write};

use crate::tree::{Kind, NodeId, Tree};
use crate::{ImageError, Result};

const TRAILER: &str = "TRAILER!!!";
const CHUNK: usize = 1 << 18;

/// One member's header fields.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    links: u32,
    mtime: u32,
    size: u32,
    device: (u32, u32),
}

/// Counts what is written, for padding.
struct Out<W> {
    inner: W,
    written: u64,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.inner.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, to: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.put(&vec![0; missing as usize])
    }

    fn header(&mut self, header: &Header, name: &[u8]) -> io::Result<()> {
        let Header {
            inode,
            mode,
            uid,
            gid,
            links,
            mtime,
            size,
            device,
        } = *header;
        let length = name.len() as u32 + 1;
        let fields = [
            inode, mode, uid, gid, links, mtime, size, 0, 0, device.0, device.1, length, 0,
        ];
        let mut text = "070701".to_owned();
        for field in fields {
            text.push_str(&format!("{field:08x}"));
        }
        self.put(text.as_bytes())?;
        self.put(name)?;
        self.put(&[0])?;
        self.pad(4)
    }
}

/// Writes the whole tree; returns the archive's length. Hard links become copies.
pub(super) fn write(
    tree: &Tree,
    out: impl Write,
    failed: impl Fn(io::Error) -> ImageError,
) -> Result<u64> {
    let mut out = Out {
        inner: out,
        written: 0,
    };
    let mut inode = 1;
    let mut todo: Vec<(Vec<u8>, NodeId)> = vec![(b".".to_vec(), NodeId::ROOT)];
    while let Some((path, id)) = todo.pop() {
        let node = tree.node(id);
        let mut header = Header {
            inode,
            mode: u32::from(node.meta.mode) | type_bits(&node.kind),
            uid: node.meta.uid,
            gid: node.meta.gid,
            links: 1,
            mtime: u32::try_from(node.meta.mtime).unwrap_or_default(),
            ..Header::default()
        };
        inode += 1;
        match &node.kind {
            Kind::Dir(entries) => {
                header.links = 2;
                out.header(&header, &path).map_err(&failed)?;
                // Parents come before what is in them; the order among children is that of their names.
                for (name, &child) in entries.iter().rev() {
                    let base: &[u8] = if id == NodeId::ROOT { b"" } else { &path };
                    let slash: &[u8] = if base.is_empty() { b"" } else { b"/" };
                    todo.push(([base, slash, name].concat(), child));
                }
            }
            Kind::File(content) => {
                header.size = u32::try_from(content.len()).map_err(|_| {
                    ImageError::malformed(String::from_utf8_lossy(&path), "it has more than 4 GiB")
                })?;
                out.header(&header, &path).map_err(&failed)?;
                let reader = content.open()?;
                let mut buffer = vec![0; CHUNK];
                let mut done = 0;
                while done < content.len() {
                    let part = &mut buffer[..(content.len() - done).min(CHUNK as u64) as usize];
                    reader.read_exact_at(part, done)?;
                    out.put(part).map_err(&failed)?;
                    done += part.len() as u64;
                }
                out.pad(4).map_err(&failed)?;
            }
            Kind::Symlink(target) => {
                header.size = target.len() as u32;
                out.header(&header, &path).map_err(&failed)?;
                out.put(target).and_then(|()| out.pad(4)).map_err(&failed)?;
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                header.device = (*major, *minor);
                out.header(&header, &path).map_err(&failed)?;
            }
            Kind::Fifo | Kind::Socket => out.header(&header, &path).map_err(&failed)?,
        }
    }
    let trailer = Header {
        links: 1,
        ..Header::default()
    };
    out.header(&trailer, TRAILER.as_bytes())
        .and_then(|()| out.pad(512))
        .map_err(&failed)?;
    out.inner.flush().map_err(&failed)?;
    Ok(out.written)
}

fn type_bits(kind: &Kind) -> u32 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice { .. } => 0o020_000,
        Kind::Dir(_) => 0o040_000,
        Kind::BlockDevice { .. } => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}
