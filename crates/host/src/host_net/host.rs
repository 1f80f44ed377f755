//! Settings of the host itself: packet forwarding, silence on taps, and its name servers.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;

use super::HostNetError;

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Turns on forwarding between interfaces. Returns whether that changed anything.
pub(super) fn enable_forwarding() -> Result<bool, HostNetError> {
    let now = fs::read_to_string(IP_FORWARD).map_err(HostNetError::Forwarding)?;
    if now.trim() == "1" {
        return Ok(false);
    }
    fs::write(IP_FORWARD, "1").map_err(HostNetError::Forwarding)?;
    Ok(true)
}

/// Keeps the host from sending and receiving IPv6 on a tap. Otherwise the host would give itself an
/// address there, and accept routes from any guest that advertises them.
pub(super) fn silence(tap: &str) -> Result<(), HostNetError> {
    set(&format!("ipv6/conf/{tap}/disable_ipv6"), "1")
}

/// Does the same on our own bridge, which carries IPv4 only, and keeps the host from using a guest
/// as its router.
pub(super) fn harden_bridge(bridge: &str) -> Result<(), HostNetError> {
    silence(bridge)?;
    for setting in ["accept_redirects", "send_redirects", "accept_source_route"] {
        set(&format!("ipv4/conf/{bridge}/{setting}"), "0")?;
    }
    Ok(())
}

/// Changes a network setting of the kernel. A missing setting is ignored, since its protocol is
/// missing as well; a setting that cannot be written is accepted if it has the value already.
fn set(setting: &str, value: &str) -> Result<(), HostNetError> {
    let path = Path::new("/proc/sys/net").join(setting);
    let Err(source) = fs::write(&path, value) else {
        return Ok(());
    };
    let is_right = || fs::read_to_string(&path).is_ok_and(|now| now.trim() == value);
    if source.kind() == ErrorKind::NotFound || is_right() {
        return Ok(());
    }
    Err(HostNetError::Setting {
        setting: format!("net/{setting}"),
        source,
    })
}

/// The name servers of this host that guests can reach too; empty if they are unknown.
pub(super) fn name_servers() -> Vec<IpAddr> {
    // With systemd-resolved, the first file names only its stub resolver, at an address of the
    // host's own.
    for path in ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"] {
        let servers = servers_in(&fs::read_to_string(Path::new(path)).unwrap_or_default());
        if !servers.is_empty() {
            return servers;
        }
    }
    Vec::new()
}

fn servers_in(resolv_conf: &str) -> Vec<IpAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse().ok())
        .filter(|address: &IpAddr| address.is_ipv4() && !address.is_loopback())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_name_servers_that_a_guest_can_reach_are_told() {
        let text = "# made by hand\nsearch example.org\nnameserver 127.0.0.53\n\
                    nameserver 192.0.2.7\n nameserver\t192.0.2.8\nnameserver fe80::1\noptions edns0\n";
        assert_eq!(
            servers_in(text),
            ["192.0.2.7", "192.0.2.8"].map(|address| address.parse::<IpAddr>().unwrap())
        );
    }
}
