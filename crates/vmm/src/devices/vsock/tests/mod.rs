//! A guest made of plain memory, and hosts on real Unix sockets.

mod hostile;
mod life;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::*;
use crate::virtio::driver::Rig;
use crate::virtio::testing::ram;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

const GUEST_CID: u64 = 3;
const RING: u16 = 64;
/// Receive buffers, as Linux posts them: a page of data behind a header.
const RX_LEN: u32 = 4096 + HEADER_LEN as u32;
const RX_STRIDE: u64 = 0x2000;
const TX_AT: u64 = 0x20_0000;
const EVENT_AT: u64 = 0x30_0000;
/// What the guest says it can take, per connection.
const GUEST_BUFFER: u32 = 256 << 10;

pub(super) struct Guest {
    pub(super) rig: Rig<Vsock>,
    pub(super) path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

fn listener() -> (tempfile::TempDir, std::path::PathBuf, UnixListener) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    (dir, path, listener)
}

impl Guest {
    fn new() -> Self {
        Self::with(VsockLimits::default(), None)
    }

    fn with(limits: VsockLimits, connector: Option<Box<dyn GuestConnector>>) -> Self {
        let (dir, path, listener) = listener();
        let resources = VsockResources {
            listener,
            connector,
            limits,
        };
        let device = Vsock::new(resources, GUEST_CID).unwrap();
        // Without event indices the driver takes every interrupt: tests that count turn them on.
        let rig = Rig::new(device, ram(4 << 20), RING, 1 << VIRTIO_RING_F_EVENT_IDX);
        let mut guest = Self {
            rig,
            path,
            _dir: dir,
        };
        guest.post_buffers();
        guest
    }

    fn post_buffers(&mut self) {
        let base = self.rig.buffers();
        for at in 0..u64::from(RING) {
            self.rig.queues[RX].offer(&[(base + at * RX_STRIDE, RX_LEN, true)]);
        }
        for at in 0..8 {
            self.rig.queues[EVENT].offer(&[(EVENT_AT + at * 16, 8, true)]);
        }
        self.rig.kick(RX as u16);
        self.rig.kick(EVENT as u16);
    }

    /// Saves this guest and brings it to life again on a new socket, its RAM and driver as they
    /// were.
    fn restore(&mut self) -> Self {
        let (bytes, queues) = self.rig.save();
        let (dir, path, listener) = listener();
        let mut device = Vsock::new(VsockResources::new(listener), GUEST_CID).unwrap();
        device.restore(&bytes).unwrap();
        Self {
            rig: Rig::restored(device, &self.rig, &queues),
            path,
            _dir: dir,
        }
    }

    fn queue_packet(&mut self, header: Header, payload: &[u8]) {
        let memory = &self.rig.ram;
        memory
            .write_slice(&header.encode(), GuestAddress(TX_AT))
            .unwrap();
        let at = TX_AT + HEADER_LEN as u64;
        memory.write_slice(payload, GuestAddress(at)).unwrap();
        let whole = HEADER_LEN as u32 + payload.len() as u32;
        self.rig.queues[TX].offer(&[(TX_AT, whole, false)]);
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.queue_packet(header, payload);
        self.rig.kick(TX as u16);
        assert_eq!(self.rig.error(), None);
        assert!(
            self.rig.queues[TX].take_used().is_some(),
            "packet not taken"
        );
    }

    /// The next packet for the guest, which gives its buffer back.
    fn recv(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.recv_keeping_buffer()?;
        let at = packet.2;
        self.rig.queues[RX].offer(&[(at, RX_LEN, true)]);
        self.rig.kick(RX as u16);
        Some((packet.0, packet.1))
    }

    fn recv_keeping_buffer(&mut self) -> Option<(Header, Vec<u8>, u64)> {
        self.rig.run();
        let (head, len) = self.rig.queues[RX].take_used()?;
        let at = self.rig.queues[RX].buffer_of(head);
        let mut bytes = vec![0; len as usize];
        self.rig
            .ram
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        Some((header, bytes.split_off(HEADER_LEN), at))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.recv().expect("a packet");
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// A host that asks for `port`.
    fn host(&mut self, port: u32) -> UnixStream {
        let mut host = UnixStream::connect(&self.path).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        writeln!(host, "CONNECT {port}").unwrap();
        self.rig.run();
        host
    }

    /// A connection that both sides agreed on.
    fn connect(&mut self, port: u32) -> (UnixStream, Socket) {
        let mut host = self.host(port);
        let request = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let socket = Socket {
            host_port: request.src_port,
            guest_port: port,
        };
        self.send(socket.packet(op::RESPONSE), &[]);
        assert_eq!(read_line(&mut host), format!("OK {}\n", request.src_port));
        (host, socket)
    }
}

/// The guest's end of a connection.
#[derive(Clone, Copy)]
struct Socket {
    host_port: u32,
    guest_port: u32,
}

impl Socket {
    fn packet(self, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest_port,
            dst_port: self.host_port,
            socket_type: TYPE_STREAM,
            op,
            buf_alloc: GUEST_BUFFER,
            ..Header::default()
        }
    }

    fn data(self, payload: &[u8]) -> Header {
        Header {
            len: payload.len() as u32,
            ..self.packet(op::RW)
        }
    }

    fn shutdown(self, flags: u32) -> Header {
        Header {
            flags,
            ..self.packet(op::SHUTDOWN)
        }
    }
}

fn read_line(host: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while host.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte[0] == b'\n' {
            break;
        }
    }
    String::from_utf8(line).unwrap()
}

/// Whether the host's stream is at its end, or has been reset.
fn is_closed(host: &mut UnixStream) -> bool {
    match host.read(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}
