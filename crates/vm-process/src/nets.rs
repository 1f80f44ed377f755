//! Builds the network interfaces of a VM from the descriptors that its launcher sent.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use clone_api::config::{NetConfig, Vhost};
use clone_api::{ApiError, ErrorCode};
use clone_start::document::AttachedNet;
use clone_start::error::Result;
use clone_vmm::devices::net::{self, Net, NetResources, Port, Tap};
use clone_vmm::rate_limit::RateLimits;

use super::rate_limits;

/// The open host side of an interface.
pub(super) struct OpenNet {
    taps: Vec<Tap>,
    vhost: Vec<File>,
    limits: RateLimits,
    attached: AttachedNet,
}

/// Takes the queues of an interface's tap from `taps`, and opens vhost-net as `config` requests.
pub(super) fn open(
    config: &NetConfig,
    attached: AttachedNet,
    taps: &mut impl Iterator<Item = OwnedFd>,
) -> Result<OpenNet> {
    let queues = attached.queues;
    let taps = taps.take(usize::from(queues)).map(Tap::from_fd);
    let taps = taps.collect::<std::result::Result<_, _>>();
    let taps = taps.map_err(|error| ApiError::internal(&error))?;
    let limits = rate_limits::limits(config.rate_limit.as_ref());
    let vhost = match config.vhost {
        Vhost::Off => Vec::new(),
        // vhost-net cannot limit rates. Validation refuses a description that requires vhost and
        // sets limits.
        _ if limits != RateLimits::default() => Vec::new(),
        Vhost::Auto | Vhost::On => match open_vhost_net(queues) {
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
        attached,
    })
}

/// Builds the device of an interface, with this VM's hardware address.
pub(super) fn device(open: OpenNet) -> Result<Net> {
    let OpenNet {
        taps,
        vhost,
        limits,
        attached,
    } = open;
    let config = net::NetConfig {
        mac: attached.mac.0,
        mtu: attached.mtu,
        queue_pairs: taps.len() as u16,
        limits,
    };
    let ports = taps.into_iter().map(|tap| Box::new(tap) as Box<dyn Port>);
    let resources = NetResources {
        ports: ports.collect(),
        vhost,
    };
    Net::new(resources, config).map_err(|error| ApiError::internal(&error))
}

/// Opens `/dev/vhost-net` once per queue pair; returns no files where this host has none.
///
/// # Errors
/// The operating system's error where the device exists but cannot be opened.
fn open_vhost_net(queues: u16) -> io::Result<Vec<File>> {
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/vhost-net")
    };
    match (0..queues).map(|_| open()).collect() {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) => Ok(Vec::new()),
        // The device file exists, but the module is not loaded.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(Vec::new()),
        result => result,
    }
}
