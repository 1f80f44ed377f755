//! Answers a guest's requests. One request after the other: none waits for anybody but the host's
//! file system, since reads, writes and flushes of regular files are done by the VM's process.
//!
//! Locks are the guest's own: they are not known on the host or in other guests.

mod directories;
mod entries;
mod extended;
mod files;
mod init;
mod metadata;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use clone_fuse::link::{self, Kind, MAX_CONTENT, MAX_MESSAGE, MAX_TABLES, Reply, Request, Wait};
use clone_fuse::wire::{IN_HEADER, InHeader, Input, op};
use rustix::io::Errno;

use crate::handles::Handles;
use crate::nodes::Nodes;
use crate::owner::Owner;
use crate::tables;

/// What is said of a share.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Who the files belong to.
    pub owner: Owner,
}

/// The answer to a request.
#[derive(Debug, Default)]
pub struct Answer {
    /// The body.
    pub content: Vec<u8>,
    /// The descriptor of the regular file that was opened.
    pub file: Option<Rc<OwnedFd>>,
}

impl From<Vec<u8>> for Answer {
    fn from(content: Vec<u8>) -> Self {
        let file = None;
        Self { content, file }
    }
}

/// The result of a request: an answer, or the error that the guest gets.
pub(crate) type Result<T = Answer> = std::result::Result<T, Errno>;

/// The server of a share.
#[derive(Debug)]
pub struct Server {
    nodes: Nodes,
    handles: Handles,
    settings: Settings,
    /// Saved tables that are coming in parts.
    arriving: Vec<u8>,
}

impl Server {
    /// A server of the directory `root`.
    ///
    /// # Errors
    /// Its attributes cannot be read.
    pub fn new(root: OwnedFd, settings: Settings) -> std::io::Result<Self> {
        Ok(Self {
            nodes: Nodes::new(Rc::new(root))?,
            handles: Handles::default(),
            settings,
            arriving: Vec::new(),
        })
    }

    /// Serves the VM's process until it has gone.
    ///
    /// # Errors
    /// The connection failed, or the other side said what is no request.
    pub fn serve(&mut self, socket: impl AsFd) -> std::io::Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let (len, _) = link::receive(&socket, &mut buffer, Wait::Yes)?;
            if len == 0 {
                return Ok(());
            }
            let Some(request) = Request::decode(&buffer[..len]) else {
                return Err(Errno::PROTO.into());
            };
            let tag = request.tag;
            let Some(answer) = self.request(request) else {
                continue;
            };
            send(&socket, tag, answer)?;
        }
    }

    /// Carries out a request of the VM's process. There is no answer to requests to forget.
    pub fn request(&mut self, request: Request<'_>) -> Option<Result> {
        let content = request.content;
        match request.kind {
            Kind::Guest => self.guest(content),
            Kind::Descriptor => Some(self.descriptor(content)),
            Kind::Save => Some(tables::save(&self.nodes, &self.handles).map(Answer::from)),
            Kind::Restore | Kind::RestoreEnd => {
                let is_last = request.kind == Kind::RestoreEnd;
                self.restore(content, is_last)
            }
            Kind::Reset => Some(self.reset().map(|()| Answer::default())),
        }
    }

    fn restore(&mut self, part: &[u8], is_last: bool) -> Option<Result> {
        if self.arriving.len() + part.len() > MAX_TABLES {
            self.arriving = Vec::new();
            return Some(Err(Errno::FBIG));
        }
        self.arriving.extend_from_slice(part);
        if !is_last {
            return None;
        }
        let bytes = std::mem::take(&mut self.arriving);
        let restored = tables::restore(&bytes, &self.nodes);
        Some(restored.map(|(nodes, handles)| {
            self.nodes = nodes;
            self.handles = handles;
            Answer::default()
        }))
    }

    /// Forgets all nodes and handles. Their numbers are not given again.
    fn reset(&mut self) -> Result<()> {
        let next = (self.nodes.next_number(), self.handles.next_number());
        self.nodes = Nodes::new(Rc::clone(self.nodes.root()))?;
        self.nodes.continue_at(next.0);
        self.handles = Handles::default();
        self.handles.continue_at(next.1);
        Ok(())
    }

    fn descriptor(&mut self, content: &[u8]) -> Result {
        let mut input = Input::new(content);
        let handle = input.u64()?;
        input.end()?;
        if self.handles.is_directory(handle)? {
            return Err(Errno::ISDIR);
        }
        let file = self.handles.file(&mut self.nodes, handle)?;
        Ok(Answer {
            content: Vec::new(),
            file: Some(file),
        })
    }

    /// Carries out a request of the guest.
    fn guest(&mut self, message: &[u8]) -> Option<Result> {
        let Some((header, body)) = message.split_first_chunk::<IN_HEADER>() else {
            return Some(Err(Errno::INVAL));
        };
        let InHeader { opcode, node, .. } = InHeader::decode(header);
        let input = Input::new(body);
        match opcode {
            op::FORGET => {
                self.forget(node, input);
                None
            }
            op::BATCH_FORGET => {
                self.batch_forget(input);
                None
            }
            op::INTERRUPT => None,
            _ => Some(self.dispatch(opcode, node, input)),
        }
    }

    fn dispatch(&mut self, opcode: u32, node: u64, input: Input<'_>) -> Result {
        let bytes = match opcode {
            op::INIT => {
                self.reset()?;
                init::answer(input)
            }
            op::DESTROY => self.reset().map(|()| Vec::new()),
            op::LOOKUP => self.lookup(node, input),
            op::GETATTR => self.get_attributes(node, input),
            op::SETATTR => self.set_attributes(node, input),
            op::READLINK => self.read_link(node),
            op::SYMLINK => self.symlink(node, input),
            op::MKNOD => self.make_node(node, input),
            op::MKDIR => self.make_directory(node, input),
            op::UNLINK => self.unlink(node, input, false),
            op::RMDIR => self.unlink(node, input, true),
            op::RENAME => self.rename(node, input, false),
            op::RENAME2 => self.rename(node, input, true),
            op::LINK => self.link(node, input),
            op::STATFS => self.file_system(),
            op::SETXATTR => self.set_extended(node, input),
            op::GETXATTR => self.get_extended(node, input),
            op::LISTXATTR => self.list_extended(node, input),
            op::REMOVEXATTR => self.remove_extended(node, input),
            op::OPEN => return self.open(node, input),
            op::CREATE => return self.create(node, input, false),
            op::TMPFILE => return self.create(node, input, true),
            op::RELEASE | op::RELEASEDIR => self.release(input),
            op::OPENDIR => self.open_directory(node, input),
            op::READDIR => self.read_directory(node, input, false),
            op::READDIRPLUS => self.read_directory(node, input, true),
            op::FSYNCDIR => self.sync_directory(input),
            op::SYNCFS => self.sync_file_system(),
            // ACCESS is answered by the guest, which knows the modes. FLUSH, STATX and locks have
            // an equivalent in the guest's kernel, which does not ask again.
            _ => Err(Errno::NOSYS),
        };
        bytes.map(Answer::from)
    }

    fn forget(&mut self, node: u64, mut input: Input<'_>) {
        if let Ok(count) = input.u64() {
            self.nodes.forget(node, count);
        }
    }

    fn batch_forget(&mut self, mut input: Input<'_>) {
        let (Ok(count), Ok(_)) = (input.u32(), input.u32()) else {
            return;
        };
        for _ in 0..count {
            let (Ok(node), Ok(lookups)) = (input.u64(), input.u64()) else {
                return;
            };
            self.nodes.forget(node, lookups);
        }
    }

    /// The number of nodes.
    #[cfg(test)]
    fn node_count(&self) -> usize {
        self.nodes.len()
    }
}

/// Sends an answer, in as many messages as it needs.
fn send(socket: impl AsFd, tag: u64, answer: Result) -> std::io::Result<()> {
    let (answer, error) = match answer {
        Ok(answer) => (answer, None),
        Err(error) => (Answer::default(), Some(error)),
    };
    let mut left = &answer.content[..];
    let mut file = answer.file.as_deref();
    loop {
        let (content, rest) = left.split_at(left.len().min(MAX_CONTENT));
        let more = !rest.is_empty();
        let reply = Reply {
            tag,
            error,
            more,
            content,
        };
        let file = file.take().map(AsFd::as_fd);
        link::send(&socket, &reply.header(), content, file, Wait::Yes)?;
        if !more {
            return Ok(());
        }
        left = rest;
    }
}
