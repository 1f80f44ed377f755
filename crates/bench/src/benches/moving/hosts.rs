//! Two hosts in one: the second is a network namespace, with a bridge on each side and a cable
//! between them; and the ticks that guests on either send to the first.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::super::net::ip;

/// The second host's network namespace.
pub(super) const NAMESPACE: &str = "clonebench";
/// The bridge of each host. They have the same name, as a VM that moves asks for.
pub(super) const BRIDGE: &str = "clonebench0";
const CABLE: [&str; 2] = ["clonebench1", "clonebench2"];
/// The first host's address on its bridge, and its network's length.
const ADDRESS: (&str, &str) = ("10.217.3.1", "/24");
/// The guest's.
const GUEST: &str = "10.217.3.2/24";
/// QEMU's taps.
pub(super) const TAP: &str = "clonebench3";

/// The two hosts; gone when dropped.
pub(super) struct Hosts;

impl Hosts {
    pub(super) fn new() -> Result<Self> {
        remove();
        let hosts = Self;
        ip(&["netns", "add", NAMESPACE])?;
        ip(&[
            "link", "add", CABLE[0], "type", "veth", "peer", "name", CABLE[1],
        ])?;
        ip(&["link", "set", CABLE[1], "netns", NAMESPACE])?;
        let address = format!("{}{}", ADDRESS.0, ADDRESS.1);
        for (there, cable) in [(&[][..], CABLE[0]), (&["-n", NAMESPACE], CABLE[1])] {
            let on = |words: &[&str]| ip(&[there, words].concat());
            on(&["link", "add", BRIDGE, "type", "bridge"])?;
            on(&["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
            for port in [cable, TAP] {
                on(&["link", "set", port, "master", BRIDGE, "up"])?;
            }
            on(&["link", "set", BRIDGE, "up"])?;
        }
        ip(&["address", "add", &address, "dev", BRIDGE])?;
        Ok(hosts)
    }

    /// Runs `work` on a thread that is on the second host, as are the processes that it starts.
    pub(super) fn on_second<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let on_it = scope.spawn(|| {
                enter()?;
                work()
            });
            on_it.join().expect("the second host does not panic")
        })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        remove();
    }
}

fn remove() {
    // Of a run that was ended by force, too; what is not there need not be removed.
    let _ = ip(&["link", "delete", CABLE[0]]);
    for there in [&[][..], &["-n", NAMESPACE]] {
        for link in [TAP, BRIDGE] {
            let _ = ip(&[there, &["link", "delete", link]].concat());
        }
    }
    let _ = ip(&["netns", "delete", NAMESPACE]);
}

/// Puts this thread into the second host's network.
fn enter() -> Result<()> {
    use std::os::fd::AsFd;
    let path = format!("/run/netns/{NAMESPACE}");
    let namespace = std::fs::File::open(&path).with_context(|| format!("cannot open {path}"))?;
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)
        .context("cannot enter the second host's network")
}

/// What the guest runs to have its address, where it has none.
pub(super) fn address_script() -> String {
    format!("ip link set eth0 up && ip addr add {GUEST} dev eth0")
}

/// Receives a guest's ticks.
pub(super) struct Ticks {
    address: String,
    seen: Arc<Mutex<Vec<Instant>>>,
}

impl Ticks {
    /// Listens at the first host's address, until the process ends.
    pub(super) fn listen() -> Result<Self> {
        let socket = UdpSocket::bind((ADDRESS.0, 0)).context("cannot listen on the bridge")?;
        let address = socket.local_addr()?.to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let taken = Arc::clone(&seen);
        thread::spawn(move || {
            while socket.recv(&mut [0; 8]).is_ok() {
                let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
                taken.push(Instant::now());
            }
        });
        Ok(Self { address, seen })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The longest time without a tick from `start` until now.
    pub(super) fn longest_gap(&self, start: Instant) -> Result<Duration> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen: Vec<Instant> = seen.iter().copied().filter(|at| *at >= start).collect();
        anyhow::ensure!(seen.len() > 1, "the guest does not tick");
        seen.push(Instant::now());
        let gaps = seen.windows(2).map(|pair| pair[1] - pair[0]);
        Ok(gaps.max().unwrap_or_default())
    }

    /// Forgets all ticks so far.
    pub(super) fn forget(&self) {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}
