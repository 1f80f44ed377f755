//! Sets up the host's side of a VM's network for the process that is started next.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use clone_api::config::{Egress, NetConfig, NetMode};
use clone_api::{ApiError, ErrorCode, VmConfig};
use clone_start::VmDir;
use clone_start::document::AttachedNet;
use clone_start::error::Result;
use clone_start::vm_dir::GuestInterface;
use clone_vmm::devices::net::Tap;

use crate::host_net::{Connection, DEFAULT_DIR, HostNet, HostNetError, Request};
use crate::runtime::Runtime;

/// The interfaces of a VM after they were set up.
pub(super) struct Attached {
    /// The taps' queues, which are sent to the VM's process. A tap exists while any process has one
    /// of its queues open.
    pub(super) taps: Vec<OwnedFd>,
    /// The part of the interfaces' description that the VM's process needs.
    pub(super) nets: Vec<AttachedNet>,
    /// The configuration for the guest.
    pub(super) guest: Vec<GuestInterface>,
    /// Notices for the owner.
    pub(super) notices: Vec<String>,
}

/// Sets up every interface of `config`, and fills in the addresses that we assign.
///
/// After a failure, the interfaces set up so far are removed with the VM's directory.
///
/// An interface keeps its address of the `former` ones where that is free; a notice says where it
/// is not.
pub(super) fn attach(
    runtime: &Runtime,
    dir: &VmDir,
    config: &mut VmConfig,
    former: &[GuestInterface],
) -> Result<Attached> {
    let mut host = HostNet::new(DEFAULT_DIR);
    if let Ok(suspended) = runtime.suspended() {
        host = host.with_reserved(suspended.reserved());
    }
    let (mut taps, mut nets, mut notices) = (Vec::new(), Vec::new(), Vec::new());
    let mut guest = Vec::new();
    for (index, net) in config.net.iter_mut().enumerate() {
        let former = former.get(index).and_then(|it| it.address.as_ref());
        let former = former.map(|address| address.address);
        let attachment = host
            .attach(&request(dir, net, former))
            .map_err(|error| to_api_error(index, &error))?;
        let now = attachment.address.as_ref().map(|it| it.address);
        if let (Some(former), Some(now)) = (former, now)
            && former != now
        {
            let notice = format!("net[{index}]: the address {former} is taken; it is {now} now");
            notices.push(notice);
        }
        let of_this = attachment.notices.into_iter();
        notices.extend(of_this.map(|notice| format!("net[{index}]: {notice}")));
        net.mac = Some(attachment.mac);
        guest.push(GuestInterface {
            mac: attachment.mac,
            address: attachment.address.clone(),
        });
        // The kernel's command line can set up one interface, which is the first, since it has the
        // default route.
        let address = attachment.address.filter(|_| index == 0);
        nets.push(AttachedNet {
            queues: attachment.taps.len() as u16,
            mac: attachment.mac,
            mtu: attachment.mtu,
            kernel_argument: address.map(|a| a.kernel_argument(&config.name, "eth0")),
        });
        taps.extend(attachment.taps.into_iter().map(Tap::into_fd));
    }
    Ok(Attached {
        taps,
        nets,
        guest,
        notices,
    })
}

/// Changes the destinations that a VM's guest may send to, and whether it may open connections to the
/// host, on all of its interfaces.
pub(super) fn restrict(dir: &VmDir, egress: &Egress, reach_host: bool) -> Result<()> {
    HostNet::new(DEFAULT_DIR)
        .restrict(&dir.network_key(), egress, reach_host)
        .map_err(|error| ApiError::internal(&error))
}

fn request(dir: &VmDir, net: &NetConfig, address: Option<Ipv4Addr>) -> Request {
    // Validation has checked that each mode has its name.
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    Request {
        vm: dir.network_key(),
        connection: match net.mode {
            NetMode::Nat => Connection::Nat,
            NetMode::Bridge => Connection::Bridge(name(&net.bridge)),
            NetMode::Tap => Connection::Tap(name(&net.tap)),
        },
        mac: net.mac,
        address,
        queues: net.queues.unwrap_or(1),
        neighbours: net.neighbours,
        reach_host: net.reach_host,
        egress: net.egress.clone(),
        addresses: net.addresses.clone(),
        connections: net.connections,
    }
}

fn to_api_error(index: usize, error: &HostNetError) -> ApiError {
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

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;

    /// A description with one interface, on a tap of this name.
    fn on_tap(name: &str) -> VmConfig {
        VmConfig {
            net: vec![NetConfig {
                mode: NetMode::Tap,
                tap: Some(name.to_owned()),
                queues: Some(2),
                ..NetConfig::default()
            }],
            ..VmConfig::default()
        }
    }

    #[test]
    fn taps_stay_close_on_exec_until_they_are_sent() {
        let in_its_network = || {
            // SAFETY: the flag leaves the table of descriptors alone.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            let add = [
                "tuntap",
                "add",
                "dev",
                "t0",
                "mode",
                "tap",
                "multi_queue",
                "vnet_hdr",
            ];
            assert!(Command::new("ip").args(add).status().unwrap().success());
            let dir = VmDir::at("/nowhere".into());
            let root = tempfile::tempdir().unwrap();
            let runtime = Runtime::at(root.path()).unwrap();
            let attached = attach(&runtime, &dir, &mut on_tap("t0"), &[]).unwrap();
            assert_eq!((attached.taps.len(), attached.nets[0].queues), (2, 2));
            for tap in &attached.taps {
                assert!(fcntl_getfd(tap).unwrap().contains(FdFlags::CLOEXEC));
            }
        };
        // Namespaces are a thread's.
        thread::spawn(in_its_network).join().unwrap();
    }
}
