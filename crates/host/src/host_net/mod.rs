//! The host's side of a VM's network: taps, bridges, addresses, translation.
//!
//! With [`Connection::Nat`] guests share a bridge of our own (`clone0`) with a private address
//! range, and reach the world through the host's addresses. With [`Connection::Bridge`] a guest
//! is a station on a bridge that the owner made, and with [`Connection::Tap`] it gets a tap that
//! the owner made and nothing else is done. Every tap of ours is guarded ([`guard`]): a guest
//! sends under its own addresses or not at all.
//!
//! A tap of ours lives as long as its descriptors, so it goes with the VM's process however that
//! ends, and its guard with it. The rest (filter rules, leases, and with the last guest bridge and
//! table) is removed by [`HostNet::detach`], or by [`HostNet::sweep`] for VMs that were killed. All
//! calls may run at once in any number of processes.
//!
//! Rules that somebody removed are made again by the next call, and at once where a process
//! [watches](HostNet::watch). Until then nothing passes.
//!
//! This runs in the launching process, never in the VM's. It leaves the guest's own configuration
//! to the kernel's command line ([`GuestAddress::kernel_argument`]) or the agent.

mod error;
mod firewall;
mod guard;
mod host;
mod lease;
mod link;
mod range;
mod ruleset;
mod site;
mod tc;
mod watch;

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clone_api::MacAddr;
use clone_api::config::Egress;
use clone_start::vm_dir::GuestAddress;
use clone_vmm::devices::net::Tap;

pub use error::HostNetError;
pub use range::Range;
pub use watch::Watch;

use lease::{Lease, Leases};
use link::Links;
use site::Site;

/// The bridge of our own.
pub const BRIDGE: &str = "clone0";

/// Where leases are kept unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/clone/net";

/// The MTU, in bytes, that guests have unless told otherwise.
const USUAL_MTU: u32 = 1500;

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
    /// The destinations that the guest may send to; all for a tap that is not ours.
    pub egress: Egress,
    /// The only addresses that the guest may use on a bridge of the owner's; any if there are none.
    pub addresses: Vec<IpAddr>,
    /// The most connections that a guest behind NAT may have in the host's table, if not the
    /// usual number.
    pub connections: Option<u32>,
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
            Connection::Bridge(name) => Site::open(&self.dir)?.attach_bridge(request, name),
            Connection::Nat => Site::open(&self.dir)?.attach_nat(request, self.range),
        }
    }

    /// Changes the destinations that the VM's guest may send to, on all of its interfaces: from the
    /// return on it is held to them. For a VM that has nothing here it does nothing.
    ///
    /// # Errors
    /// [`HostNetError`]; the guest may then be held to either.
    pub fn restrict(&self, vm: &str, egress: &Egress) -> Result<(), HostNetError> {
        if !Path::new(&self.dir).exists() {
            return Ok(());
        }
        Site::open(&self.dir)?.restrict(vm, egress)
    }

    /// Makes the rules again that somebody removed. Returns whether there was anything to do.
    ///
    /// # Errors
    /// [`HostNetError`]; nothing passes then that the rules would not let pass.
    pub fn repair(&self) -> Result<bool, HostNetError> {
        if !Path::new(&self.dir).exists() {
            return Ok(false);
        }
        Site::open(&self.dir)?.repair()
    }

    /// Repairs the rules as soon as somebody removes them, for as long as the result lives.
    ///
    /// # Errors
    /// [`HostNetError::Netlink`] where the kernel does not announce changes.
    pub fn watch(&self) -> Result<Watch, HostNetError> {
        Watch::start(self.clone()).map_err(HostNetError::Netlink)
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
        Site::release(Leases::lock(&self.dir)?, which)
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
        mtu: unusual(link.mtu),
        address: None,
        notices: Vec::new(),
    })
}

/// An MTU that guests must be told of.
fn unusual(mtu: Option<u32>) -> Option<u16> {
    mtu.filter(|&mtu| mtu != USUAL_MTU)
        .and_then(|mtu| u16::try_from(mtu).ok())
}
