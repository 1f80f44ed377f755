//! The host's side of a VM's network, set up for the process that is to be started.

use std::os::fd::{AsRawFd, OwnedFd};

use clone_api::config::{Egress, NetConfig, NetMode};
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_vmm::devices::net::Tap;
use rustix::io::FdFlags;

use crate::error::Result;
use crate::host_net::{Connection, DEFAULT_DIR, HostNet, HostNetError, Request};
use crate::process::start::InheritedNet;
use crate::runtime::{GuestInterface, VmDir};

/// The interfaces of a VM, set up.
pub(super) struct Attached {
    /// The taps' queues, which a child inherits. The taps live as long as any process has them.
    pub(super) taps: Vec<OwnedFd>,
    /// What the child must know.
    pub(super) nets: Vec<InheritedNet>,
    /// How the guest is to set them up.
    pub(super) guest: Vec<GuestInterface>,
    /// What the owner should know.
    pub(super) notices: Vec<String>,
}

/// Sets up every interface of `config` and fills in the addresses that were left to us.
///
/// What is set up before a failure is removed with the VM's directory.
pub(super) fn attach(dir: &VmDir, config: &mut VmConfig) -> Result<Attached> {
    let host = HostNet::new(DEFAULT_DIR);
    let (mut taps, mut nets, mut notices) = (Vec::new(), Vec::new(), Vec::new());
    let mut guest = Vec::new();
    for (index, net) in config.net.iter_mut().enumerate() {
        let attachment = host
            .attach(&request(dir, net))
            .map_err(|error| told(index, &error))?;
        let of_this = attachment.notices.into_iter();
        notices.extend(of_this.map(|notice| format!("net[{index}]: {notice}")));
        let queues = attachment.taps.into_iter().map(Tap::into_fd);
        let queues: Vec<OwnedFd> = queues.collect();
        for queue in &queues {
            rustix::io::fcntl_setfd(queue, FdFlags::empty())
                .map_err(|error| ApiError::internal(&std::io::Error::from(error)))?;
        }
        net.mac = Some(attachment.mac);
        guest.push(GuestInterface {
            mac: attachment.mac,
            address: attachment.address.clone(),
        });
        // The kernel sets up one interface so, and the first is the one with the way out.
        let address = attachment.address.filter(|_| index == 0);
        nets.push(InheritedNet {
            taps: queues.iter().map(AsRawFd::as_raw_fd).collect(),
            mac: attachment.mac,
            mtu: attachment.mtu,
            kernel_argument: address.map(|a| a.kernel_argument(&config.name, "eth0")),
        });
        taps.extend(queues);
    }
    Ok(Attached {
        taps,
        nets,
        guest,
        notices,
    })
}

/// Changes whom a VM's guest may send to, on all of its interfaces.
pub(super) fn restrict(dir: &VmDir, egress: &Egress) -> Result<()> {
    HostNet::new(DEFAULT_DIR)
        .restrict(&dir.network_key(), egress)
        .map_err(|error| ApiError::internal(&error))
}

fn request(dir: &VmDir, net: &NetConfig) -> Request {
    // Validation has made sure that a mode comes with its name.
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    Request {
        vm: dir.network_key(),
        connection: match net.mode {
            NetMode::Nat => Connection::Nat,
            NetMode::Bridge => Connection::Bridge(name(&net.bridge)),
            NetMode::Tap => Connection::Tap(name(&net.tap)),
        },
        mac: net.mac,
        queues: net.queues.unwrap_or(1),
        neighbours: net.neighbours,
        egress: net.egress.clone(),
        addresses: net.addresses.clone(),
        connections: net.connections,
    }
}

fn told(index: usize, error: &HostNetError) -> ApiError {
    let told = ApiError::internal(error);
    let code = match error {
        HostNetError::NotAllowed { .. } | HostNetError::NoTrafficControl(_) => {
            ErrorCode::HostUnsupported
        }
        HostNetError::NoSuchLink(_)
        | HostNetError::NotABridge(_)
        | HostNetError::MulticastMac(_)
        | HostNetError::MacInUse(_) => ErrorCode::InvalidConfig,
        _ => told.code,
    };
    ApiError {
        code,
        message: format!("net[{index}]: {}", told.message),
        ..told
    }
}
