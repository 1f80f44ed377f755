//! The network that the host gave the guest at its start: the kernel's `ip=` arguments.
//!
//! A kernel with `CONFIG_IP_PNP` reads them itself; distributions' kernels mostly lack it, and its
//! device names are those of before udev renames them. So the n-th argument is for the n-th
//! Ethernet interface, whatever it is called.
//!
//! Source: Linux `Documentation/admin-guide/nfs/nfsroot.rst`.

use std::fs;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use agent_proto::messages::{Identity, Interface};

use crate::conversation::STACK_BYTES;
use crate::identity;

/// The time limit for an interface whose driver is not loaded yet, and the interval of the checks,
/// since sysfs sends no notification.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(100);

/// Sets up the network that the kernel's command line describes. A separate thread waits for
/// interfaces that do not exist yet.
pub(crate) fn set_up() {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let Some(identity) = parse(&cmdline) else {
        return;
    };
    if identity::boot_network(&identity) {
        return;
    }
    let wait = move || {
        for _ in 0..TRIES {
            thread::sleep(PAUSE);
            if identity::boot_network(&identity) {
                return;
            }
        }
        crate::say("no Ethernet interface for the addresses on the kernel's command line");
    };
    let spawned = thread::Builder::new().stack_size(STACK_BYTES).spawn(wait);
    if let Err(error) = spawned {
        crate::say(&format!("no thread to wait for the network: {error}"));
    }
}

/// The interfaces and name servers of all `ip=` arguments; `None` if there are none.
fn parse(cmdline: &str) -> Option<Identity> {
    let mut identity = Identity::default();
    for argument in cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("ip="))
    {
        let fields: Vec<&str> = argument.split(':').collect();
        // client:server:gateway:netmask:host:device:autoconf:dns0:dns1
        let [client, _, gateway, netmask, rest @ ..] = &fields[..] else {
            continue;
        };
        let (Ok(_), Ok(mask)) = (client.parse::<Ipv4Addr>(), netmask.parse::<Ipv4Addr>()) else {
            continue;
        };
        identity.interfaces.push(Interface {
            address: format!("{client}/{}", mask.to_bits().leading_ones()),
            gateway: (*gateway).to_owned(),
            ..Default::default()
        });
        let servers = rest
            .iter()
            .skip(3)
            .filter(|server| server.parse::<Ipv4Addr>().is_ok());
        identity
            .dns
            .extend(servers.map(|server| (*server).to_owned()));
    }
    (!identity.interfaces.is_empty()).then_some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_from_the_kernel_s_command_line() {
        let line = "quiet ip=10.213.0.2::10.213.0.1:255.255.0.0:dev:eth0:off:9.9.9.9 root=/dev/vda";
        let identity = parse(line).unwrap();
        assert_eq!(identity.interfaces[0].address, "10.213.0.2/16");
        assert_eq!(identity.interfaces[0].gateway, "10.213.0.1");
        assert_eq!(identity.dns, ["9.9.9.9"]);
    }

    #[test]
    fn other_forms_of_the_argument_are_left_to_the_kernel() {
        for line in [
            "",
            "ip=dhcp",
            "ip=on",
            "ip=:::::eth0:dhcp",
            "zip=1.2.3.4::1.1.1.1:255.0.0.0",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
