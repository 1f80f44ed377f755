//! A network beyond the host's uplink, and sockets that see what arrives somewhere.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType};

use crate::wire::{enter_new_network, run, thread_id};

/// The host's address on its uplink, and the world's.
pub(crate) const UPLINK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub(crate) const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// Another host, reached over the interface `uplink`.
pub(crate) struct World {
    pub(crate) socket: UdpSocket,
    pub(crate) sniffer: Sniffer,
}

impl World {
    /// Connects this network to a new world, which routes everything back to it.
    pub(crate) fn new() -> Self {
        let (to_main, from_world) = mpsc::channel();
        let (to_world, from_main) = mpsc::channel::<()>();
        // Sockets keep the network that they were made in.
        let world = thread::spawn(move || {
            enter_new_network();
            to_main.send(thread_id()).unwrap();
            from_main.recv().unwrap();
            run(&format!("ip address add {WORLD}/24 dev world"));
            run("ip link set world up");
            run(&format!("ip route add default via {UPLINK}"));
            let socket = UdpSocket::bind((WORLD, 9)).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(500)))
                .unwrap();
            Self {
                socket,
                sniffer: Sniffer::new(libc::ETH_P_IP),
            }
        });
        let id = from_world.recv().unwrap();
        run(&format!(
            "ip link add uplink type veth peer name world netns {id}"
        ));
        run(&format!("ip address add {UPLINK}/24 dev uplink"));
        run("ip link set uplink up");
        to_world.send(()).unwrap();
        let world = world.join().unwrap();
        run(&format!("ip route add default via {WORLD}"));
        world
    }

    /// The next datagram that arrives here, if one does soon.
    pub(crate) fn hears(&self) -> Option<(Vec<u8>, SocketAddr)> {
        let mut text = [0; 64];
        let (len, from) = self.socket.recv_from(&mut text).ok()?;
        Some((text[..len].to_vec(), from))
    }
}

/// Sees the frames of one type that any interface of this network passes on to the host's stack.
pub(crate) struct Sniffer(OwnedFd);

impl Sniffer {
    /// `ether_type` as in `ETH_P_IP`. Frames of one type are seen after all filters of an
    /// interface; all types at once (`ETH_P_ALL`) before them.
    pub(crate) fn new(ether_type: i32) -> Self {
        let protocol = u32::from((ether_type as u16).to_be());
        let socket = rustix::net::socket_with(
            AddressFamily::PACKET,
            SocketType::RAW,
            SocketFlags::NONBLOCK,
            Some(Protocol::from_raw(protocol.try_into().unwrap())),
        );
        Self(socket.unwrap())
    }

    /// The frames that were seen since the last call.
    pub(crate) fn frames(&self) -> Vec<Vec<u8>> {
        let mut frame = vec![0; 2048];
        let mut frames = Vec::new();
        while let Ok((len, _)) = rustix::net::recv(&self.0, &mut frame[..], RecvFlags::empty()) {
            frames.push(frame[..len].to_vec());
        }
        frames
    }
}
