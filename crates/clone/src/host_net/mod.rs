//! The host's side of a VM's network: taps, bridges, addresses, translation.
//!
//! With [`Connection::Nat`] guests share a bridge of our own (`clone0`) with a private address
//! range, and reach the world through the host's addresses. With [`Connection::Bridge`] a guest
//! is a station on a bridge that the owner made, and with [`Connection::Tap`] it gets a tap that
//! the owner made and nothing else is done. Every tap of ours is guarded: a guest sends under its
//! own addresses or not at all.
//!
//! A tap of ours lives as long as its descriptors, so it goes with the VM's process however that
//! ends. The rest (filter rules, leases, and with the last guest bridge and tables) is removed by
//! [`HostNet::detach`], or by [`HostNet::sweep`] for VMs that were killed. All calls may run at
//! once in any number of processes.
//!
//! This runs in the launching process, never in the VM's. It leaves the guest's own configuration
//! to the kernel's command line ([`GuestAddress::kernel_argument`]) or the agent.

mod error;
mod firewall;
mod host;
mod lease;
mod link;
mod range;

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clone_api::MacAddr;
use clone_api::config::Egress;
use clone_vmm::devices::net::Tap;
use serde::{Deserialize, Serialize};

pub use error::HostNetError;
pub use range::Range;

use lease::{Creator, Lease, Leases, Nat};
use link::{Link, Links};

/// The bridge of our own.
pub const BRIDGE: &str = "clone0";

/// Where leases are kept unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/clone/net";

/// Slots on a bridge that is not ours, where no address range limits them.
const LAST_SLOT: u16 = 0xfffe;

/// What a network interface is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Our own bridge, with an address from us and translation to the host's.
    Nat,
    /// A bridge that exists; the guest finds its address there.
    Bridge(String),
    /// A tap that exists.
    Tap(String),
}

/// A network interface that a VM wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The VM's name, as [`HostNet::sweep`] will ask for it.
    pub vm: String,
    /// What to connect it to.
    pub connection: Connection,
    /// The guest's hardware address; `None` for one of ours.
    pub mac: Option<MacAddr>,
    /// Queue pairs, at least 1.
    pub queues: u16,
    /// Whether the guest may reach others on the same bridge that may do so too.
    pub neighbours: bool,
    /// Whom the guest may send to; all for a tap that is not ours.
    pub egress: Egress,
}

/// A network interface that is ready for a VM.
#[derive(Debug)]
pub struct Attachment {
    /// The tap's queues, one per queue pair. The tap goes when the last of them is closed.
    pub taps: Vec<Tap>,
    /// The tap's name.
    pub tap_name: String,
    /// The guest's hardware address.
    pub mac: MacAddr,
    /// The MTU in bytes to tell the guest, where it is not the usual 1,500.
    pub mtu: Option<u16>,
    /// What the guest must set up, where the address is ours to give.
    pub address: Option<GuestAddress>,
    /// What the owner should know, a sentence each.
    pub notices: Vec<String>,
}

/// How a guest is to set up its interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAddress {
    /// Its address.
    pub address: Ipv4Addr,
    /// The network's prefix length in bits.
    pub prefix: u8,
    /// Where it sends what is not on its network.
    pub gateway: Ipv4Addr,
    /// Whom it asks for names.
    pub name_servers: Vec<IpAddr>,
}

impl GuestAddress {
    /// The kernel argument that sets up `device` in a guest whose kernel has `CONFIG_IP_PNP`, or
    /// whose initramfs reads it. Source: the Linux kernel's `nfsroot.rst`.
    pub fn kernel_argument(&self, host_name: &str, device: &str) -> String {
        let netmask = Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(self.prefix.clamp(1, 32))));
        let mut argument = format!(
            "ip={}::{}:{netmask}:{host_name}:{device}:off",
            self.address, self.gateway
        );
        for server in self.name_servers.iter().take(2) {
            argument.push_str(&format!(":{server}"));
        }
        argument
    }
}

/// The host's network, as far as it is ours.
#[derive(Clone, Debug)]
pub struct HostNet {
    dir: PathBuf,
    range: Option<Range>,
}

impl HostNet {
    /// With leases kept in `dir` (see [`DEFAULT_DIR`]). Processes that share a network namespace
    /// must share the directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            range: None,
        }
    }

    /// With this range for guests, should the bridge not be there yet; otherwise one that is free
    /// on this host is picked.
    #[must_use]
    pub fn with_range(self, range: Range) -> Self {
        Self {
            range: Some(range),
            ..self
        }
    }

    /// Sets up a network interface. On failure nothing of it is left.
    ///
    /// # Errors
    /// [`HostNetError`], with the step that failed and what to do about it.
    pub fn attach(&self, request: &Request) -> Result<Attachment, HostNetError> {
        if let Some(mac) = request.mac
            && mac.is_group()
        {
            return Err(HostNetError::MulticastMac(mac.to_string()));
        }
        match &request.connection {
            Connection::Tap(name) => attach_tap(name, request),
            Connection::Bridge(name) => {
                let site = Site::open(&self.dir)?;
                let bridge = site
                    .links
                    .find(name)?
                    .ok_or_else(|| HostNetError::NoSuchLink(name.clone()))?;
                if !bridge.is_bridge {
                    return Err(HostNetError::NotABridge(name.clone()));
                }
                site.attach(request, (name, bridge), None)
            }
            Connection::Nat => {
                let site = Site::open(&self.dir)?;
                site.attach_nat(request, self.range)
            }
        }
    }

    /// Changes whom the VM's guest may send to, on all of its interfaces: from the return on it is
    /// held to it. For a VM that has nothing here it does nothing.
    ///
    /// # Errors
    /// [`HostNetError`]; the guest may then be held to either.
    pub fn restrict(&self, vm: &str, egress: &Egress) -> Result<(), HostNetError> {
        if !Path::new(&self.dir).exists() {
            return Ok(());
        }
        let leases = Leases::lock(&self.dir)?;
        let mut all = leases.contents()?.leases;
        let mut changed = Vec::new();
        for lease in all.iter_mut().filter(|lease| lease.vm == vm) {
            let before = std::mem::replace(&mut lease.egress, egress.clone());
            // Whoever makes the tables anew does it from this.
            leases.add(lease)?;
            changed.push((before, lease.clone()));
        }
        let nat = leases.nat()?;
        firewall::restrict(&changed, &all, nat.as_ref().map(|nat| &nat.range))
    }

    /// Removes what was set up for the VM, and with the last one what all shared. For a VM that
    /// has nothing here it does nothing.
    ///
    /// # Errors
    /// [`HostNetError`]; what is left then is left to [`HostNet::sweep`].
    pub fn detach(&self, vm: &str) -> Result<(), HostNetError> {
        self.release(|lease| lease.vm == vm).map(drop)
    }

    /// Removes what was left by VMs that no longer live, and returns their names. VMs that are
    /// starting are left alone.
    ///
    /// # Errors
    /// [`HostNetError`].
    pub fn sweep(&self, alive: impl Fn(&str) -> bool) -> Result<Vec<String>, HostNetError> {
        self.release(|lease| !alive(&lease.vm) && !lease.creator.may_be_starting())
    }

    fn release(&self, which: impl Fn(&Lease) -> bool) -> Result<Vec<String>, HostNetError> {
        if !Path::new(&self.dir).exists() {
            return Ok(Vec::new());
        }
        let leases = Leases::lock(&self.dir)?;
        let contents = leases.contents()?;
        let (gone, kept): (Vec<_>, Vec<_>) = contents.leases.into_iter().partition(which);
        let something = !gone.is_empty() || !contents.damaged.is_empty();
        let last = kept.is_empty() && (something || leases.has_nat());
        if !something && !last {
            return Ok(Vec::new());
        }
        let site = Site {
            leases,
            links: Links::open()?,
        };
        let slots = gone.iter().map(|lease| lease.slot);
        for slot in slots.clone().chain(contents.damaged.iter().copied()) {
            site.links.delete(&Lease::tap_name(slot))?;
        }
        if last {
            firewall::clear()?;
            if site.leases.has_nat() {
                site.links.delete(BRIDGE)?;
                site.leases.remove_nat()?;
            }
        } else if contents.damaged.is_empty() {
            firewall::dismiss(&gone)?;
        } else {
            // Which rules the damaged ones had is not known.
            let nat = site.leases.nat()?;
            firewall::rebuild(&kept, nat.as_ref().map(|nat| &nat.range))?;
        }
        for slot in slots.chain(contents.damaged.iter().copied()) {
            site.leases.remove(slot)?;
        }
        Ok(gone.into_iter().map(|lease| lease.vm).collect())
    }
}

/// Opens `/dev/vhost-net` once per queue pair; nothing where this host has none.
///
/// # Errors
/// The system's answer where it is there but does not open.
pub fn open_vhost_net(queues: u16) -> io::Result<Vec<File>> {
    let open = || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/vhost-net")
    };
    match (0..queues).map(|_| open()).collect() {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) => Ok(Vec::new()),
        // The module is not there although its device file is.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        result => result,
    }
}

/// The leases, locked, and the interfaces that they speak of.
struct Site {
    leases: Leases,
    links: Links,
}

impl Site {
    fn open(dir: &Path) -> Result<Self, HostNetError> {
        Ok(Self {
            leases: Leases::lock(dir)?,
            links: Links::open()?,
        })
    }

    fn attach_nat(
        &self,
        request: &Request,
        wanted: Option<Range>,
    ) -> Result<Attachment, HostNetError> {
        let (range, bridge) = self.ensure_bridge(wanted)?;
        let mut notices = Vec::new();
        let attached = host::enable_forwarding().and_then(|changed| {
            if changed {
                notices.push(
                    "turned on forwarding for the whole host (net.ipv4.ip_forward = 1); it stays on"
                        .to_owned(),
                );
            }
            self.attach(request, (BRIDGE, bridge), Some(range))
        });
        match attached {
            Ok(attachment) => Ok(Attachment {
                notices,
                ..attachment
            }),
            Err(error) => {
                self.undo(self.remove_if_unused());
                Err(error)
            }
        }
    }

    /// Finds or makes the bridge of our own.
    fn ensure_bridge(&self, wanted: Option<Range>) -> Result<(Range, Link), HostNetError> {
        let found = self.links.find(BRIDGE)?;
        let recorded = self.leases.nat()?;
        let range = match (&recorded, found) {
            (Some(nat), Some(bridge)) => return Ok((nat.range, bridge)),
            // Guests that have lost their bridge keep their addresses.
            (Some(nat), None) => nat.range,
            (None, Some(_)) if !self.leases.has_nat() => {
                return Err(HostNetError::Foreign(BRIDGE.to_owned()));
            }
            (None, Some(_)) => {
                self.links.delete(BRIDGE)?;
                self.free_range(wanted)?
            }
            (None, None) => self.free_range(wanted)?,
        };
        self.leases.set_nat(&Nat { range })?;
        match self.links.create_bridge(BRIDGE, &range) {
            Ok(bridge) => Ok((range, bridge)),
            Err(error) => {
                self.undo(self.remove_if_unused());
                Err(error)
            }
        }
    }

    fn free_range(&self, wanted: Option<Range>) -> Result<Range, HostNetError> {
        match wanted {
            Some(range) => Ok(range),
            None => Range::first_free(&self.links.networks_in_use()?),
        }
    }

    /// Sets up a guarded tap on a bridge, with an address where there is a range.
    fn attach(
        &self,
        request: &Request,
        bridge: (&str, Link),
        range: Option<Range>,
    ) -> Result<Attachment, HostNetError> {
        let last = range.map_or(LAST_SLOT, |range| range.last_slot());
        // An interface that exists without a lease is someone else's.
        let slot = self.leases.free_slot(last, |slot| {
            Ok(self.links.find(&Lease::tap_name(slot))?.is_none())
        })?;
        let address = range.map(|range| range.at(slot));
        let mac = match (request.mac, address) {
            (Some(mac), _) => mac,
            (None, Some(address)) => Range::mac_of(address),
            (None, None) => link::random_mac().map_err(HostNetError::Netlink)?,
        };
        let lease = Lease {
            vm: request.vm.clone(),
            slot,
            mac,
            address,
            neighbours: request.neighbours,
            egress: request.egress.clone(),
            creator: Creator::this_process(),
        };
        self.leases.add(&lease)?;
        match self.open_tap(&lease, bridge, request, range.as_ref()) {
            Ok(taps) => Ok(Attachment {
                taps,
                tap_name: lease.tap(),
                mac,
                mtu: bridge
                    .1
                    .mtu
                    .and_then(|mtu| u16::try_from(mtu).ok())
                    .filter(|&mtu| mtu != 1500),
                address: range.map(|range| GuestAddress {
                    address: range.at(slot),
                    prefix: range.prefix(),
                    gateway: range.gateway(),
                    name_servers: host::name_servers(),
                }),
                notices: Vec::new(),
            }),
            Err(error) => {
                // The tap goes with its descriptors, but a child that this process is just
                // starting may hold copies for a moment.
                self.undo(self.links.delete(&lease.tap()));
                self.undo(firewall::dismiss(std::slice::from_ref(&lease)));
                self.undo(self.leases.remove(slot));
                self.undo(self.remove_if_unused());
                Err(error)
            }
        }
    }

    fn open_tap(
        &self,
        lease: &Lease,
        bridge: (&str, Link),
        request: &Request,
        range: Option<&Range>,
    ) -> Result<Vec<Tap>, HostNetError> {
        let all = self.leases.contents()?.leases;
        let nat = self.leases.nat()?;
        let range = range.or(nat.as_ref().map(|nat| &nat.range));
        // Before the tap is there, so that no frame of it passes unguarded.
        firewall::admit(lease, &all, range)?;
        let taps = Tap::open(&lease.tap(), request.queues)?;
        self.links.join(&lease.tap(), bridge, !request.neighbours)?;
        Ok(taps)
    }

    /// Removes bridge and tables where no lease is left.
    fn remove_if_unused(&self) -> Result<(), HostNetError> {
        let contents = self.leases.contents()?;
        if !contents.leases.is_empty() || !contents.damaged.is_empty() {
            return Ok(());
        }
        let cleared = firewall::clear();
        if self.leases.has_nat() {
            self.links.delete(BRIDGE)?;
            self.leases.remove_nat()?;
        }
        cleared
    }

    /// A failure while undoing hides no other: the first is what its user must know.
    fn undo(&self, result: Result<(), HostNetError>) {
        if let Err(error) = result {
            tracing::warn!(%error, "left something of a network interface behind; the next command sweeps it");
        }
    }
}

fn attach_tap(name: &str, request: &Request) -> Result<Attachment, HostNetError> {
    // Opening a tap that is not there would make one, on no bridge and without a word.
    let links = Links::open()?;
    let link = links
        .find(name)?
        .ok_or_else(|| HostNetError::NoSuchLink(name.to_owned()))?;
    let mac = match request.mac {
        Some(mac) => mac,
        None => link::random_mac().map_err(HostNetError::Netlink)?,
    };
    Ok(Attachment {
        taps: Tap::open(name, request.queues)?,
        tap_name: name.to_owned(),
        mac,
        mtu: link
            .mtu
            .and_then(|mtu| u16::try_from(mtu).ok())
            .filter(|&mtu| mtu != 1500),
        address: None,
        notices: Vec::new(),
    })
}
