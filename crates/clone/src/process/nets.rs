//! The network interfaces of a VM: from inherited descriptors to devices.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use clone_api::config::{NetConfig, Vhost};
use clone_api::{ApiError, ErrorCode};
use clone_vmm::devices::net::{self, Net, NetResources, NetState, Port, Tap};
use clone_vmm::rate_limit::RateLimits;
use rustix::io::FdFlags;

use super::devices;
use super::start::InheritedNet;
use crate::error::Result;
use crate::host_net;

/// An interface's host side, open.
pub(super) struct OpenNet {
    taps: Vec<Tap>,
    vhost: Vec<File>,
    limits: RateLimits,
    inherited: InheritedNet,
}

/// Takes the descriptors over, and opens vhost-net as `config` wants.
pub(super) fn open(config: &NetConfig, inherited: InheritedNet) -> Result<OpenNet> {
    let queues = inherited.taps.len() as u16;
    let taps = inherited.taps.iter().map(|&fd| take(fd));
    let taps = taps.collect::<Result<_>>()?;
    let limits = devices::limits(config.rate_limit.as_ref());
    let vhost = match config.vhost {
        Vhost::Off => Vec::new(),
        // The kernel's path knows no limits; validation refuses to be told both.
        _ if limits != RateLimits::default() => Vec::new(),
        Vhost::Auto | Vhost::On => match host_net::open_vhost_net(queues) {
            Ok(files) if files.is_empty() && config.vhost == Vhost::On => {
                return Err(ApiError::new(
                    ErrorCode::HostUnsupported,
                    "vhost=on, but this host has no /dev/vhost-net",
                )
                .advise("load the module vhost_net, or leave vhost out"));
            }
            Ok(files) => files,
            Err(error) if config.vhost == Vhost::Auto => {
                tracing::warn!(%error, "/dev/vhost-net cannot be used: packets go through this process");
                Vec::new()
            }
            Err(error) => {
                return Err(ApiError::new(
                    ErrorCode::HostUnsupported,
                    format!("vhost=on, but /dev/vhost-net cannot be opened: {error}"),
                )
                .advise("give yourself access to it, or leave vhost out"));
            }
        },
    };
    Ok(OpenNet {
        taps,
        vhost,
        limits,
        inherited,
    })
}

fn take(fd: RawFd) -> Result<Tap> {
    // SAFETY: the launcher opened this descriptor for us and tells each number once; nothing in
    // this process, which has just been started, uses it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)
        .map_err(|error| ApiError::internal(&std::io::Error::from(error)))?;
    Tap::from_fd(fd).map_err(|error| ApiError::internal(&error))
}

/// The device of an interface, new or as it was `saved`, with the hardware address of this VM.
pub(super) fn device(open: OpenNet, saved: Option<&[u8]>) -> Result<Net> {
    let OpenNet {
        taps,
        vhost,
        limits,
        inherited,
    } = open;
    let state = match saved {
        Some(bytes) => NetState::decode(bytes)
            .map_err(|error| ApiError::internal(&error))?
            .with_mac(inherited.mac.0),
        None => NetState::fresh(net::NetConfig {
            mac: inherited.mac.0,
            mtu: inherited.mtu,
            queue_pairs: taps.len() as u16,
            limits,
        }),
    };
    let ports = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>);
    let resources = NetResources {
        ports: ports.collect(),
        vhost,
    };
    Net::new(resources, state).map_err(|error| ApiError::internal(&error))
}
