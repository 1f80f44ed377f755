//! Network interfaces: hardware addresses, IPv4 addresses, default routes (netdevice(7)).

use std::ffi::CString;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use agent_proto::messages::{ErrorCode, Interface};

use crate::conversation::Refusal;

/// Where the kernel lists interfaces.
const NET: &str = "/sys/class/net";

/// The loopback interface, which the agent brings up when it is the init.
pub(crate) fn bring_loopback_up() {
    let up = Control::open().and_then(|control| control.set_up("lo", true));
    if let Err(error) = up {
        crate::say(&format!("cannot bring the loopback up: {error}"));
    }
}

/// The name of an interface that is given by name, or by its place among the Ethernet interfaces;
/// `None` where the guest has no such one.
pub(crate) fn name_of(index: usize, interface: &Interface) -> Option<String> {
    match interface.name.as_str() {
        "" => ethernet_names().into_iter().nth(index),
        name => Path::new(NET).join(name).exists().then(|| name.to_owned()),
    }
}

/// Gives the interface called `name` its addresses.
///
/// # Errors
/// The interface keeps an address that another guest has too.
pub(crate) fn set_addresses(name: &str, interface: &Interface) -> Result<(), Refusal> {
    let failed = |what: &str, error: &io::Error| {
        let what = format!("two guests would have one address: {name}: cannot {what}");
        Refusal::io(what, error)
    };
    let control = Control::open().map_err(|error| failed("configure it", &error))?;
    if !interface.mac.is_empty() {
        let mac = parse_mac(&interface.mac)
            .ok_or_else(|| invalid(format!("{:?} is not a hardware address", interface.mac)))?;
        // A hardware address changes only while the interface is down.
        control
            .set_up(name, false)
            .and_then(|()| control.set_mac(name, mac))
            .map_err(|error| failed("set its hardware address", &error))?;
    }
    if !interface.address.is_empty() {
        let (address, mask) = parse_address(&interface.address).ok_or_else(|| {
            invalid(format!(
                "{:?} is not an IPv4 address/prefix",
                interface.address
            ))
        })?;
        control
            .set_address(name, address, mask)
            .map_err(|error| failed("set its address", &error))?;
    }
    Ok(())
}

/// Brings the interface called `name` up, and makes its gateway the default one.
pub(crate) fn bring_up(name: &str, interface: &Interface) -> Result<(), Refusal> {
    let failed =
        |what: &str, error: &io::Error| Refusal::io(format!("{name}: cannot {what}"), error);
    let control = Control::open().map_err(|error| failed("configure it", &error))?;
    control
        .set_up(name, true)
        .map_err(|error| failed("bring it up", &error))?;
    if interface.gateway.is_empty() {
        return Ok(());
    }
    let gateway = interface
        .gateway
        .parse()
        .map_err(|_| invalid(format!("{:?} is not an IPv4 address", interface.gateway)))?;
    control
        .set_gateway(gateway)
        .map_err(|error| failed("set the gateway", &error))
}

fn invalid(message: String) -> Refusal {
    Refusal::new(ErrorCode::Invalid, message)
}

/// Ethernet interfaces with a device behind them, in the order of their device.
fn ethernet_names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(NET) else {
        return Vec::new();
    };
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let device = fs::canonicalize(path.join("device")).ok()?;
            let name = path.file_name()?.to_str()?.to_owned();
            Some((device, name))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, name)| name).collect()
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next().filter(|part| part.len() == 2)?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn parse_address(text: &str) -> Option<(Ipv4Addr, Ipv4Addr)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix: u32 = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
    Some((address.parse().ok()?, Ipv4Addr::from_bits(mask)))
}

/// A socket for the kernel's interface requests.
struct Control(OwnedFd);

impl Control {
    fn open() -> io::Result<Self> {
        // SAFETY: plain system call with constant arguments.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: socket has just given us this descriptor, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn request(&self, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: all the codes used here take an ifreq, and it is a live one.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), code, request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn set_up(&self, name: &str, up: bool) -> io::Result<()> {
        let mut request = named(name)?;
        self.request(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just filled this member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let bit = libc::IFF_UP as i16;
        request.ifr_ifru.ifru_flags = if up { flags | bit } else { flags & !bit };
        self.request(libc::SIOCSIFFLAGS, &mut request)
    }

    fn set_mac(&self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = named(name)?;
        // SAFETY: all-zero is a valid address of this type.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (slot, byte) in address.sa_data.iter_mut().zip(mac) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.request(libc::SIOCSIFHWADDR, &mut request)
    }

    fn set_address(&self, name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        let mut request = named(name)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.request(libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = socket_address(mask);
        self.request(libc::SIOCSIFNETMASK, &mut request)
    }

    /// Replaces the default route.
    fn set_gateway(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: all-zero is a valid route request.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_flags = libc::RTF_UP;
        // Old default routes, however many; none is no error.
        // SAFETY: the code takes an rtentry, and it is a live one.
        while unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCDELRT, &raw mut route) } == 0 {}
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: as above.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SIOCADDRT, &raw mut route) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = CString::new(name)?.into_bytes_with_nul();
    if bytes.len() > request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name is too long",
        ));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(bytes) {
        *slot = byte as libc::c_char;
    }
    Ok(request)
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut result = libc::sockaddr {
        sa_family: libc::AF_INET as u16,
        sa_data: [0; 14],
    };
    // Port (2 bytes), then the address in network order.
    for (slot, byte) in result.sa_data[2..6].iter_mut().zip(address.octets()) {
        *slot = byte as libc::c_char;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_or_refused() {
        assert_eq!(parse_mac("02:00:00:00:00:fe"), Some([2, 0, 0, 0, 0, 0xFE]));
        for wrong in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "2:0:0:0:0:0",
            "0g:00:00:00:00:00",
        ] {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
        let (address, mask) = parse_address("10.1.2.3/20").unwrap();
        assert_eq!(
            (address.to_string(), mask.to_string()),
            ("10.1.2.3".into(), "255.255.240.0".into())
        );
        assert_eq!(
            parse_address("10.0.0.1/0").unwrap().1,
            Ipv4Addr::UNSPECIFIED
        );
        assert_eq!(parse_address("10.0.0.1/33"), None);
        assert_eq!(parse_address("10.0.0.1"), None);
    }
}
