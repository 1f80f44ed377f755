//! The far ends of the test's cables: network namespaces, and guests that are a tap's descriptor
//! and a few hand-made frames.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use clone_api::MacAddr;
use clone_host::host_net::Attachment;

/// Runs `test` on a thread that has a network of its own, as root.
pub(crate) fn in_new_network(test: impl FnOnce() + Send + 'static) {
    let outcome = thread::spawn(|| {
        enter_new_network();
        test();
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Moves this thread (and the threads and programs that it starts) into a new network.
pub(crate) fn enter_new_network() {
    // SAFETY: unshare takes flags and touches no memory of ours.
    let returned = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(
        returned,
        0,
        "these tests make network namespaces: run them as root ({})",
        std::io::Error::last_os_error()
    );
    run("ip link set lo up");
}

/// This thread's id, by which `ip` finds its network.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: gettid has no arguments and cannot fail.
    unsafe { libc::gettid() }
}

/// Runs a command line of plain words; it must succeed.
pub(crate) fn run(line: &str) -> String {
    try_run(line).unwrap_or_else(|error| panic!("{line}: {error}"))
}

/// Runs a command line of plain words.
pub(crate) fn try_run(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap();
    let output = Command::new(program).args(words).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(String::from_utf8(output.stderr).unwrap())
    }
}

pub(crate) const ARP: [u8; 2] = [0x08, 0x06];
pub(crate) const IPV4: [u8; 2] = [0x08, 0x00];
const VNET_HEADER: usize = 12;

/// A guest without a VM: it has a tap and an address, and speaks when told to.
pub(crate) struct Guest {
    pub(crate) attachment: Attachment,
    pub(crate) mac: MacAddr,
    pub(crate) address: Ipv4Addr,
    wire: File,
}

impl Guest {
    pub(crate) fn new(attachment: Attachment) -> Self {
        use clone_vmm::devices::net::Port;
        let wire = attachment.taps[0].file().try_clone().unwrap();
        Self {
            mac: attachment.mac,
            address: attachment
                .address
                .as_ref()
                .map_or(Ipv4Addr::UNSPECIFIED, |address| address.address),
            attachment,
            wire,
        }
    }

    pub(crate) fn gateway(&self) -> Ipv4Addr {
        self.attachment.address.as_ref().unwrap().gateway
    }

    /// Sends a frame with nothing of it checked.
    pub(crate) fn send(&mut self, to: [u8; 6], from: [u8; 6], kind: [u8; 2], payload: &[u8]) {
        let mut frame = vec![0; VNET_HEADER];
        frame.extend(to);
        frame.extend(from);
        frame.extend(kind);
        frame.extend(payload);
        frame.resize(frame.len().max(VNET_HEADER + 60), 0);
        self.wire.write_all(&frame).unwrap();
    }

    /// Sends a frame as it is.
    pub(crate) fn send_raw(&mut self, frame: &[u8]) {
        let frame = [&[0; VNET_HEADER][..], frame].concat();
        self.wire.write_all(&frame).unwrap();
    }

    /// All frames that have come.
    pub(crate) fn drain(&mut self) -> Vec<Vec<u8>> {
        let mut frame = vec![0; 2048];
        let mut frames = Vec::new();
        while let Ok(len) = self.wire.read(&mut frame) {
            frames.push(frame[VNET_HEADER..len].to_vec());
        }
        frames
    }

    /// Asks who has `whom`, claiming to be `mac` at `address`.
    pub(crate) fn ask(&mut self, whom: Ipv4Addr, mac: MacAddr, address: Ipv4Addr) {
        let mut payload = vec![0, 1, 8, 0, 6, 4, 0, 1];
        payload.extend(mac.0);
        payload.extend(address.octets());
        payload.extend([0; 6]);
        payload.extend(whom.octets());
        self.send([0xff; 6], mac.0, ARP, &payload);
    }

    /// Sends a datagram under any address.
    pub(crate) fn datagram(
        &mut self,
        gateway: MacAddr,
        from: Ipv4Addr,
        to: (Ipv4Addr, u16),
        text: &[u8],
    ) {
        let len = (20 + 8 + text.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(len.to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        packet.extend(from.octets());
        packet.extend(to.0.octets());
        let sum: u32 = packet
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
        packet[10..12].copy_from_slice(&folded.to_be_bytes());
        packet.extend(4000_u16.to_be_bytes());
        packet.extend(to.1.to_be_bytes());
        packet.extend((8 + text.len() as u16).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(text);
        self.send(gateway.0, self.mac.0, IPV4, &packet);
    }

    /// The next frame that `wanted` takes (from its destination address on), if one comes soon.
    pub(crate) fn expect(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + Duration::from_millis(500);
        let mut frame = vec![0; 2048];
        while Instant::now() < end {
            match self.wire.read(&mut frame) {
                Ok(len) if wanted(&frame[VNET_HEADER..len]) => {
                    return Some(frame[VNET_HEADER..len].to_vec());
                }
                Ok(_) => {}
                // The descriptor does not block; a poll of it is all that is waited for.
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(),
                Err(error) => panic!("the tap: {error}"),
            }
        }
        None
    }

    fn wait(&self) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.wire, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        poll(&mut fds, Some(&limit)).unwrap();
    }

    /// Asks for a station until it answers. The first frames on a new bridge may be lost: the
    /// kernel looks at changes of carriers once a second.
    pub(crate) fn finds(&mut self, whom: Ipv4Addr) -> Option<MacAddr> {
        self.finds_as(self.address, whom)
    }

    /// The same from an address of any.
    pub(crate) fn finds_as(&mut self, address: Ipv4Addr, whom: Ipv4Addr) -> Option<MacAddr> {
        (0..6).find_map(|_| {
            self.ask(whom, self.mac, address);
            self.answer_from(whom)
        })
    }

    /// Whether an answer to [`Guest::ask`] comes, and from which station.
    pub(crate) fn answer_from(&mut self, whom: Ipv4Addr) -> Option<MacAddr> {
        self.expect(|frame| {
            frame[12..14] == ARP && frame[20..22] == [0, 2] && frame[28..32] == whom.octets()
        })
        .map(|frame| MacAddr(frame[22..28].try_into().unwrap()))
    }

    /// The text of the next datagram that comes, if one does soon.
    pub(crate) fn hears_datagram(&mut self) -> Option<Vec<u8>> {
        let frame = self.expect(|frame| frame[12..14] == IPV4 && frame[23] == 17)?;
        let len = usize::from(u16::from_be_bytes([frame[38], frame[39]]));
        Some(frame[42..34 + len].to_vec())
    }

    /// Whether someone's question for `whom` comes.
    pub(crate) fn hears_question_for(&mut self, whom: Ipv4Addr) -> bool {
        self.expect(|frame| {
            frame[12..14] == ARP && frame[20..22] == [0, 1] && frame[38..42] == whom.octets()
        })
        .is_some()
    }
}
