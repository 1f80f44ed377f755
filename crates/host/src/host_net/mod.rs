//! The host's side of a VM's network: taps, bridges, addresses, translation.
//!
//! With [`Connection::Nat`], guests share our own bridge (`clone0`) with a private address range,
//! and reach other networks through the host's addresses. With [`Connection::Bridge`], a guest is a
//! station on a bridge that the owner made. With [`Connection::Tap`], it gets a tap that the owner
//! made, and nothing else is done. Every tap that we make is guarded ([`guard`]): a guest can send
//! only from its own addresses.
//!
//! A tap that we make exists as long as its descriptors, so it and its guard go when the VM's
//! process ends, however that happens. The rest (filter rules, leases, and with the last guest the
//! bridge and the table) is removed by [`HostNet::detach`], or by [`HostNet::sweep`] for VMs that
//! were killed. All calls may run at once in any number of processes.
//!
//! Rules that another program removed are made again by the next call, or immediately while a
//! process [watches](HostNet::watch). Until then no packet passes.
//!
//! This code runs in the launcher, never in the VM's process. The guest's own network configuration
//! is done by its kernel's command line ([`GuestAddress::kernel_argument`]) or by its agent.

mod error;
mod firewall;
mod guard;
mod host;
mod lease;
mod link;
mod range;
mod reserved;
mod ruleset;
mod site;
mod tc;
mod watch;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use clone_api::MacAddr;
use clone_api::config::Egress;
use clone_start::vm_dir::GuestAddress;
use clone_vmm::devices::net::Tap;

pub use error::HostNetError;
pub use range::Range;
pub use reserved::Reserved;
pub use watch::Watch;

use lease::{Lease, Leases};
use link::Links;
use site::Site;

/// The name of our own bridge.
pub const BRIDGE: &str = "clone0";

/// The default directory for leases.
pub const DEFAULT_DIR: &str = "/run/clone/net";

/// The default MTU of guests, in bytes.
const USUAL_MTU: u32 = 1500;

/// The network that an interface is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Our own bridge, with an address that we assign, translated to the host's.
    Nat,
    /// An existing bridge; the guest gets its address from the network there.
    Bridge(String),
    /// An existing tap.
    Tap(String),
}

/// A request for a network interface of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The VM's name, by which [`HostNet::sweep`] identifies it.
    pub vm: String,
    /// The network to connect the interface to.
    pub connection: Connection,
    /// The guest's hardware address; `None` for one of ours.
    pub mac: Option<MacAddr>,
    /// The address that a guest behind NAT should get, even if it is reserved; another one where it
    /// is in use or out of range. `None` for any.
    pub address: Option<Ipv4Addr>,
    /// Queue pairs, at least 1.
    pub queues: u16,
    /// Whether the guest may reach other guests on the same bridge that have this set too.
    pub neighbours: bool,
    /// Whether a guest behind NAT may open connections to the host's own addresses. Otherwise only
    /// name servers and DHCP are open there, and ICMP.
    pub reach_host: bool,
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
    /// The address that the guest must set up, if we assign it.
    pub address: Option<GuestAddress>,
    /// Notices for the owner, one sentence each.
    pub notices: Vec<String>,
}

/// The part of the host's network that we manage.
#[derive(Clone, Debug)]
pub struct HostNet {
    dir: PathBuf,
    range: Option<Range>,
    /// The addresses that are given to those alone who name them.
    reserved: Option<Reserved>,
}

impl HostNet {
    /// Keeps leases in `dir` (see [`DEFAULT_DIR`]). Processes that share a network namespace must
    /// share the directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            range: None,
            reserved: None,
        }
    }

    /// Gives no guest one of these addresses, unless the request names it.
    #[must_use]
    pub fn with_reserved(self, reserved: Reserved) -> Self {
        Self {
            reserved: Some(reserved),
            ..self
        }
    }

    /// Uses this range for guests if the bridge does not exist yet. By default a range that is free
    /// on this host is chosen.
    #[must_use]
    pub fn with_range(self, range: Range) -> Self {
        Self {
            range: Some(range),
            ..self
        }
    }

    /// Sets up a network interface. After a failure, nothing of it remains.
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
            Connection::Nat => {
                Site::open(&self.dir)?.attach_nat(request, self.range, self.reserved.as_ref())
            }
        }
    }

    /// Changes the destinations that the VM's guest may send to, and whether it may open connections
    /// to the host, on all of its interfaces. The change is in force when this returns. Does nothing
    /// for a VM without interfaces.
    ///
    /// # Errors
    /// [`HostNetError`]; either the old or the new destinations may then be in force.
    pub fn restrict(
        &self,
        vm: &str,
        egress: &Egress,
        reach_host: bool,
    ) -> Result<(), HostNetError> {
        if !Path::new(&self.dir).exists() {
            return Ok(());
        }
        Site::open(&self.dir)?.restrict(vm, egress, reach_host)
    }

    /// Restores the rules that another program removed. Returns whether any were missing.
    ///
    /// # Errors
    /// [`HostNetError`]; packets that the rules would not let pass do not pass then either.
    pub fn repair(&self) -> Result<bool, HostNetError> {
        if !Path::new(&self.dir).exists() {
            return Ok(false);
        }
        Site::open(&self.dir)?.repair()
    }

    /// Restores the rules as soon as they are removed, as long as the result lives.
    ///
    /// # Errors
    /// [`HostNetError::Netlink`] where the kernel does not announce changes.
    pub fn watch(&self) -> Result<Watch, HostNetError> {
        Watch::start(self.clone()).map_err(HostNetError::Netlink)
    }

    /// Removes the interfaces of the VM, and with the last VM the shared parts. Does nothing for a
    /// VM without interfaces.
    ///
    /// # Errors
    /// [`HostNetError`]; [`HostNet::sweep`] removes what remains.
    pub fn detach(&self, vm: &str) -> Result<(), HostNetError> {
        self.release(|lease| lease.vm == vm).map(drop)
    }

    /// Removes the interfaces of VMs that have ended, and returns the VMs' names. VMs that are
    /// starting are ignored.
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
    // Opening a tap that does not exist would silently make one, on no bridge.
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

/// Returns the MTU if it differs from the default, so that it must be reported to the guest.
fn unusual(mtu: Option<u32>) -> Option<u16> {
    mtu.filter(|&mtu| mtu != USUAL_MTU)
        .and_then(|mtu| u16::try_from(mtu).ok())
}
